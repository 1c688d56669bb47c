// ChatSecure: encrypted chat over raw TCP sockets, in one C++20 header, written to be read.
//
// You hold a whole chat system: sockets, framing, key exchange, passwords, end-to-end encryption,
// a threaded server and a client engine. Read it from the top: every chapter uses only the chapters
// above it (a few helpers stand further down; where one is declared, its chapter is named). Every
// byte on the wire is described next to the code that writes it.
//
//      alice's client                   server (blind relay)                    bob's client
//      +----------------+  hop channel  +--------------------+  hop channel  +---------------+
//      | seals for bob  |-------------->| sees: alice -> bob,|-------------->| opens, checks,|
//      | (end to end)   |  AES-256-GCM  | a size, ciphertext |  AES-256-GCM  | shows         |
//      +----------------+               +--------------------+               +---------------+
//
// Two independent layers of cryptography. The HOP CHANNEL (client <-> server, chapter 5) hides
// everything from the network and proves to the client that it talks to the right server. The
// END-TO-END LAYER (client <-> client, chapter 8) hides every message and file from the server. A
// stolen server sees who talks to whom, when, and how much. It does not see one word.
//
//      1. Bytes          numbers in network order, text that is safe to show, secrets that wipe
//                        themselves, files that survive a crash
//      2. Sockets        TCP connections as objects
//      3. Framing        where does a message end? TCP does not say
//      4. RSA & friends  the cryptographic tools, all from OpenSSL
//      5. Hop channel    a handshake and encrypted records
//      6. Passwords      SCRAM: log in without ever sending the password
//      7. Messages       what client and server say to each other
//      8. End to end     identities, safety numbers, sealed messages
//      9. Files          offer, consent, credit, resume, and names that cannot do harm
//     10. Connections    who writes when, and the queue in which messages wait for it
//     11. Server         the engine: one relay, many threads, and its accounts
//     12. Client         the engine: one queue of commands in, one queue of events out
//     13. Programs       asking for a password, sizes for people, lines that become commands
//     14. Other systems  what POSIX and Windows do differently, side by side
//
// Three ways through it. The lines are those of this file, prose and code; the minutes are for
// somebody who reads 15 lines in one, which is time enough to understand them:
//
//      way             chapters   lines   minutes
//      --------------  --------  ------  --------
//      an hour         2, 3, 5      899        60   How two programs talk over a network at all,
//                                                   and how they keep it to themselves: you can
//                                                   put an encrypted channel under anything.
//      a long evening  1 to 9      5032       335   The whole protocol: you can write a compatible
//                                                   client in another language.
//      a weekend       all        11394       760   And how to build on it: a server for a thousand
//                                                   people at once, a client that survives a lost
//                                                   connection, and programs for people.
//
// Each chapter ends with something to try. "Break" names changes of docs/sabotages.md, of a few
// lines each, that break a promise. Before you look: which line is it, what would an attacker make
// of it, and which test must turn red? Then let it be tried:
//
//      make sabotage ONLY=length-believed
//
// "Write" asks for something of your own, in the chapter, in namespace chatsecure (and `inline`, as
// it is in a header). A test waits for it, which is skipped otherwise and says what is missing:
//
//      make tests CXX=clang++ CXXFLAGS=-O0 && ./tests -ns -tc='exercise: varint'
//
// What it promises. The essays say which line keeps which promise, and tests attack each of them
// (README.md, "Security", has their names):
//
//      P1   An eavesdropper who steals the server's RSA key later reads nothing of recorded
//           traffic.
//      P2   A man in the middle without the pinned key gets no login and no message, is named to
//           the user, and leaves no pin.
//      P3   A changed, replayed, reordered, reflected or cut record ends the connection; no byte of
//           it is delivered.
//      P4   The server, with all its memory and disk, cannot read a message, public or private, nor
//           a file.
//      P5   The server cannot change, replay or forge a message between users, show it twice, nor
//           swap a pinned user's key unnoticed, whatever it says about who is here.
//      P6   A room member cannot make other members read something that the sender did not write.
//      P7   A stolen users.db gives no password without a PBKDF2 search, and lets nobody log in;
//           guessing online is slow, in parallel too.
//      P8   One login per user at a time; a dead connection does not lock its user out, a live one
//           is not pushed out.
//      P9   No byte of a file moves without consent; no received name leaves the folder or
//           overwrites a file.
//      P10  Any bytes from the network: a clean error, bounded memory, disk, screen and time, the
//           others unaffected.
//      P11  A crash at any instant leaves users.db, keys, pins and downloads whole: the old state
//           or the new one; and no key is made anew because one is not found where it was.
//      P12  Text from others cannot drive the terminal, and no text or name can pass for another
//           line.
//      P13  A message that its sender saw as delivered was shown; one that was not is named; none
//           is shown twice.
//
// A server in five lines, a client in five lines:
//
//      chatsecure::Server server({.data_directory = "data", .port = 5000});
//      server.run();                                     // until server.stop()
//
//      chatsecure::Client client({.host = "localhost", .user = "alice", .password = ...});
//      client.post(chatsecure::Say{"hello, world"});
//      while (auto event = client.next_event()) show(*event);
//
// What it needs: a C++20 compiler, POSIX or Windows sockets, OpenSSL 3 (link with -lcrypto, and
// with -pthread). What it cannot do: see "Security" in README.md.
//
// Everything lives in namespace chatsecure; the header defines no macro that outlives it.
// MIT licence: the text is at the end of this file.

#ifndef CHATSECURE_HPP
#define CHATSECURE_HPP

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <climits>
#include <condition_variable>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <cwchar>
#include <deque>
#include <exception>
#include <filesystem>
#include <functional>
#include <iomanip>
#include <iostream>
#include <limits>
#include <list>
#include <locale>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <semaphore>
#include <set>
#include <shared_mutex>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#ifdef _WIN32
#pragma push_macro("NOMINMAX")  // both are set for these headers, and afterwards as they were
#pragma push_macro("WIN32_LEAN_AND_MEAN")
#undef NOMINMAX
#undef WIN32_LEAN_AND_MEAN
#define NOMINMAX
#define WIN32_LEAN_AND_MEAN
#include <winsock2.h>
#include <ws2tcpip.h>
#include <windows.h>
#include <fcntl.h>
#include <io.h>
#include <sddl.h>
#include <shellapi.h>
#pragma pop_macro("WIN32_LEAN_AND_MEAN")
#pragma pop_macro("NOMINMAX")
#else
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pwd.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#endif

#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/params.h>
#include <openssl/pem.h>
#include <openssl/pkcs12.h>
#include <openssl/rand.h>
#include <openssl/rsa.h>
#include <openssl/x509.h>

namespace chatsecure {

inline constexpr std::string_view version = "0.1.0";

// =================================================================================================
//  Chapter 1. Bytes
// =================================================================================================
//
// A network carries bytes: not numbers, not text, not structs. Copying a struct into a socket works
// on your machine, today, with this compiler; the other side may store its numbers the other way
// round, pad its structs differently, or be written in another language. Then the 1 that one writes
// as 01 00 00 00 is 16,777,216 for the other, and nothing says so: where it was a length, the rest
// of the stream is lost. So we decide, once, how each kind of value is laid out, and write it byte
// by byte:
//
//      number       big-endian (the most significant byte first: "network order"), 1, 2, 4 or
//                   8 bytes: u8, u16, u32, u64
//      text         u16 length, then that many bytes of UTF-8      std::string
//      blob         u32 length, then that many bytes               Bytes, ByteView
//      fixed array  its bytes, no length: both sides know it       std::array
//      choice       the number that stands for it                  enum class, of that width
//      yes or no    1 or 0, one byte                               std::uint8_t
//
//          0x0102 as u16         01 02
//          "hi" as text          00 02 68 69
//
// A message is its fields in the order in which its struct has them, with nothing in between and
// nothing behind. A blob has its length also where it comes last. Texts in quotes in the formulas
// of this header ("CHATSEC1") are their bytes alone, without a length; || puts bytes behind others.
// Nobody who passes a text on checks that it is UTF-8: whoever shows it does, and shows what is not
// as it shows control characters.
//
// The traps of this chapter. A length that comes from the network is a claim, not a fact: Reader
// checks it against what is really there before anything is read or allocated. A text that comes
// from the network may contain escape sequences that repaint your terminal: visible() shows them
// instead of obeying them. A password in memory stays there after free() until somebody reads it:
// Secret wipes itself. A file that is half written when the power goes is neither old nor new:
// write_file() makes it one or the other.
//
// What this chapter does not protect against: somebody who can read this process's memory while
// it runs. Nobody can.

using Bytes = std::vector<std::uint8_t>;         // bytes that we own
using ByteView = std::span<const std::uint8_t>;  // bytes that somebody else owns, to read
using ByteSpan = std::span<std::uint8_t>;        // bytes that somebody else owns, to change
using Digest = std::array<std::uint8_t, 32>;     // a SHA-256 value

// ---- Errors -------------------------------------------------------------------------------------
//
// An error is a sentence for the person who will read it: what happened, with which name or number,
// and what to do. The type says whose problem it is, so that the edge (a connection's thread, a
// command, main) can decide what to do about it.

struct Error : std::runtime_error {  // something on this machine: a file, a flag, a key
    using std::runtime_error::runtime_error;
};
struct NetworkError : Error {  // the connection: refused, reset, cut, gone
    using Error::Error;
};
struct CannotConnect : NetworkError {  // nobody answers there
    using NetworkError::NetworkError;
};
struct TimedOut : NetworkError {  // nothing came in the time allowed
    using NetworkError::NetworkError;
};
struct ProtocolError : Error {  // the other side sent what it must not send
    using Error::Error;
};

// Glues its arguments into one string: concat("port ", 5000, " is in use").
template <class... Part>
std::string concat(const Part&... part) {
    std::ostringstream out;
    (out << ... << part);
    return out.str();
}

// ---- Views: text as bytes and back, without copying ---------------------------------------------

inline ByteView as_bytes(std::string_view text) {
    return {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()};
}
inline std::string_view as_text(ByteView bytes) {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}
inline std::string to_string(ByteView bytes) { return std::string(as_text(bytes)); }
inline Bytes to_bytes(ByteView bytes) { return Bytes(bytes.begin(), bytes.end()); }
inline void append(Bytes& to, ByteView more) { to.insert(to.end(), more.begin(), more.end()); }

// Exactly N bytes. Throws Error if it is another number.
template <std::size_t N>
std::array<std::uint8_t, N> to_fixed(ByteView bytes) {
    if (bytes.size() != N) throw Error(concat(N, " bytes were expected, not ", bytes.size(), "."));
    std::array<std::uint8_t, N> fixed{};
    std::copy(bytes.begin(), bytes.end(), fixed.begin());
    return fixed;
}

// One buffer from several: the transcript of a handshake, the input of a key derivation.
template <class... Part>
Bytes join(const Part&... part) {
    Bytes out;
    (append(out, ByteView(part)), ...);
    return out;
}

// Equal, in a time that does not depend on where the first difference is. Comparing a secret with
// memcmp tells an attacker with a good clock how many leading bytes were right.
inline bool equal_in_constant_time(ByteView a, ByteView b) {
    return a.size() == b.size() && CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

// ---- Secrets that wipe themselves ---------------------------------------------------------------
//
// OPENSSL_cleanse is memset that the compiler may not optimise away ("nobody reads it afterwards"
// is precisely the point). We wipe by type, in a destructor, because discipline forgets the
// early return and the exception.

// A secret of N bytes, all zero until filled. It moves (the source is wiped) and never copies.
template <std::size_t N>
class Secret {
  public:
    Secret() = default;
    explicit Secret(ByteView from) : bytes_(to_fixed<N>(from)) {}
    Secret(Secret&& other) noexcept : bytes_(other.bytes_) { other.wipe(); }
    Secret& operator=(Secret&& other) noexcept {
        bytes_ = other.bytes_;
        if (this != &other) other.wipe();
        return *this;
    }
    Secret(const Secret&) = delete;
    Secret& operator=(const Secret&) = delete;
    ~Secret() { wipe(); }

    ByteView view() const { return bytes_; }
    ByteSpan span() { return bytes_; }

  private:
    void wipe() noexcept { OPENSSL_cleanse(bytes_.data(), N); }
    std::array<std::uint8_t, N> bytes_{};
};

// For secrets whose size is not known beforehand (passwords, PEM text): an allocator that wipes
// what it gives back, also when a vector grows and leaves its old memory behind. There is no
// SecretString: std::string keeps short texts inside itself, where no allocator can wipe them.
template <class T>
struct WipingAllocator {
    using value_type = T;
    WipingAllocator() = default;
    template <class U>
    explicit WipingAllocator(const WipingAllocator<U>&) noexcept {}
    T* allocate(std::size_t n) { return std::allocator<T>().allocate(n); }
    void deallocate(T* p, std::size_t n) noexcept {
        OPENSSL_cleanse(p, n * sizeof(T));
        std::allocator<T>().deallocate(p, n);
    }
    friend bool operator==(const WipingAllocator&, const WipingAllocator&) { return true; }
};
using SecretBytes = std::vector<std::uint8_t, WipingAllocator<std::uint8_t>>;

inline SecretBytes to_secret(std::string_view text) {
    return SecretBytes(text.begin(), text.end());
}

// ---- Writer and Reader --------------------------------------------------------------------------
//
// Every message in this program says once which fields it has, in a function `fields`, and that
// one function serves for writing and for reading:
//
//      struct Joined {
//          LoginId id{};
//          std::string user;
//          static void fields(auto& self, auto& io) { io(self.id, self.user); }
//      };
//
// A Writer takes the fields and appends their bytes; a Reader takes the same fields and fills them.
// The two can never disagree about the order.

class Writer {
  public:
    // Appends to `out`, which must outlive the Writer.
    explicit Writer(Bytes& out) : out_(out) {}

    template <class... Field>
    Writer& operator()(const Field&... field) {
        (put(field), ...);
        return *this;
    }

    void raw(ByteView bytes) { append(out_, bytes); }

  private:
    template <std::unsigned_integral T>
    void put(T number) {
        for (int shift = 8 * (static_cast<int>(sizeof(T)) - 1); shift >= 0; shift -= 8)
            out_.push_back(static_cast<std::uint8_t>(number >> shift));
    }
    template <class E>
    requires std::is_enum_v<E>
    void put(E value) { put(static_cast<std::underlying_type_t<E>>(value)); }
    void put(const std::string& text) {
        if (text.size() > 0xffff) throw Error("A text field holds at most 65535 bytes.");
        put(static_cast<std::uint16_t>(text.size()));
        raw(as_bytes(text));
    }
    void put(ByteView blob) {
        if (blob.size() > 0xffffffff) throw Error("A blob holds at most 4 GiB.");
        put(static_cast<std::uint32_t>(blob.size()));
        raw(blob);
    }
    template <std::size_t N>
    void put(const std::array<std::uint8_t, N>& fixed) {
        raw(fixed);
    }

    Bytes& out_;
};

class Reader {
  public:
    // Reads from `in`, which must outlive the Reader and every ByteView read from it. `what` names
    // the thing in errors: "a login message".
    Reader(ByteView in, std::string_view what) : in_(in), what_(what) {}

    // Throws ProtocolError if a field reaches over the end.
    template <class... Field>
    Reader& operator()(Field&... field) {
        (get(field), ...);
        return *this;
    }

    ByteView raw(std::size_t size) {
        if (size > in_.size())
            throw ProtocolError(concat("Received ", what_, " that is cut short."));
        ByteView taken = in_.first(size);
        in_ = in_.subspan(size);
        return taken;
    }
    ByteView rest() { return raw(in_.size()); }
    bool empty() const { return in_.empty(); }

    // Call it when everything was read: bytes that nobody asked for are an error too. A parser that
    // ignores them lets two programs disagree about what was said.
    void finish() const {
        if (!in_.empty())
            throw ProtocolError(
                concat("Received ", what_, " with ", in_.size(), " bytes too many."));
    }

  private:
    template <std::unsigned_integral T>
    void get(T& number) {
        number = 0;
        for (std::uint8_t byte : raw(sizeof(T)))
            number = static_cast<T>(static_cast<T>(number << (sizeof(T) > 1 ? 8 : 0)) | byte);
    }
    template <class E>
    requires std::is_enum_v<E>
    void get(E& value) {
        std::underlying_type_t<E> number{};
        get(number);
        value = static_cast<E>(number);  // may be a value without a name: switches have a default
    }
    void get(std::string& text) {
        std::uint16_t size{};
        get(size);
        text = to_string(raw(size));
    }
    void get(ByteView& blob) {  // a view into the input, not a copy
        std::uint32_t size{};
        get(size);
        blob = raw(size);
    }
    void get(Bytes& blob) {
        ByteView view;
        get(view);
        blob = to_bytes(view);
    }
    template <std::size_t N>
    void get(std::array<std::uint8_t, N>& fixed) {
        fixed = to_fixed<N>(raw(N));
    }

    ByteView in_;
    std::string_view what_;
};

// Appends some values to `out`.
template <class... Field>
void append_fields(Bytes& out, const Field&... field) {
    Writer writer(out);
    writer(field...);
}

// The bytes of a value that has `fields`, behind those that are in `out`, or alone; and the value
// that some bytes hold.
template <class T>
void encode_to(Bytes& out, const T& value) {
    Writer writer(out);
    T::fields(value, writer);
}
template <class T>
Bytes encode(const T& value) {
    Bytes out;
    encode_to(out, value);
    return out;
}
template <class T>
T decode(ByteView bytes, std::string_view what) {
    T value;
    Reader reader(bytes, what);
    T::fields(value, reader);
    reader.finish();
    return value;
}

// ---- Hexadecimal and base64 ---------------------------------------------------------------------

inline std::string to_hex(ByteView bytes) {
    static constexpr std::string_view digits = "0123456789abcdef";
    std::string out;
    for (std::uint8_t byte : bytes) {
        out += digits[byte >> 4];
        out += digits[byte & 15];
    }
    return out;
}

// RFC 4648 section 4, with padding.
inline std::string to_base64(ByteView bytes) {
    std::string out(4 * ((bytes.size() + 2) / 3) + 1, '\0');  // OpenSSL adds a final NUL
    EVP_EncodeBlock(reinterpret_cast<unsigned char*>(out.data()), bytes.data(),
                    static_cast<int>(bytes.size()));
    out.pop_back();
    return out;
}

// Strict: no white space, padding required, one text for each value. (EVP_DecodeBlock alone is
// lenient, and counts the padding as zero bytes. Two spellings of one key are one too many.) Throws
// Error.
inline Bytes from_base64(std::string_view text) {
    Bytes out(text.size() / 4 * 3);
    int size = text.empty() ? 0
                            : EVP_DecodeBlock(out.data(), as_bytes(text).data(),
                                              static_cast<int>(text.size()));
    if (size < 0) throw Error("A base64 text is damaged.");
    out.resize(static_cast<std::size_t>(size));
    for (int padding = 0; padding < 2 && !out.empty() && text.ends_with('='); ++padding) {
        text.remove_suffix(1);
        out.pop_back();
    }
    std::string again = to_base64(out);
    if (again.substr(0, text.size()) != text ||
        again.find_first_not_of('=', text.size()) != again.npos)
        throw Error("A base64 text is damaged.");
    return out;
}

// ---- Text that is safe to show ------------------------------------------------------------------

inline constexpr char32_t invalid_code_point = 0xffffffff;

// Takes one code point (RFC 3629) from the front of `text`, which must not be empty. A byte that
// begins no valid sequence (overlong, surrogate, cut short, above U+10FFFF) is taken alone and
// gives invalid_code_point.
inline char32_t take_code_point(std::string_view& text) {
    auto byte = [&](std::size_t i) { return static_cast<std::uint8_t>(text[i]); };
    std::uint8_t first = byte(0);
    std::size_t size = first < 0x80   ? 1
                       : first < 0xc2 ? 0
                       : first < 0xe0 ? 2
                       : first < 0xf0 ? 3
                                      : 4;
    bool valid = size != 0 && first < 0xf5 && size <= text.size();
    char32_t point = size < 2 ? first : first & (0xffU >> (size + 1));
    for (std::size_t i = 1; valid && i < size; ++i) {
        valid = (byte(i) & 0xc0) == 0x80;
        point = point << 6 | (byte(i) & 0x3f);
    }
    constexpr std::array<char32_t, 5> smallest{0, 0, 0x80, 0x800, 0x10000};
    valid = valid && point >= smallest[size] && point <= 0x10ffff &&
            !(point >= 0xd800 && point <= 0xdfff);
    text.remove_prefix(valid ? size : 1);
    return valid ? point : invalid_code_point;
}

// Code points that a terminal or a window obeys instead of drawing: the control characters (ESC
// begins the sequences that move the cursor, rename the window, or type for you), and the marks
// that reverse the direction of text, so that what you read is not what is there. (The weak marks
// U+200E, U+200F and U+061C stay: Hebrew and Arabic are written with them.)
inline bool drives_the_screen(char32_t point) {
    return point < 0x20 || (point >= 0x7f && point <= 0x9f) || point == 0x2028 || point == 0x2029 ||
           (point >= 0x202a && point <= 0x202e) || (point >= 0x2066 && point <= 0x2069);
}

// `text` with everything that could drive a terminal made visible: ESC becomes the four characters
// \x1b. Text from another person, from a server or from a file passes through here, at the last
// moment, before it is shown (property P12).
inline std::string visible(std::string_view text) {
    std::string out;
    auto escape = [&](char letter, ByteView bytes) {
        out += '\\';
        out += letter;
        out += to_hex(bytes);
    };
    while (!text.empty()) {
        std::string_view before = text;
        char32_t point = take_code_point(text);
        std::string_view taken = before.substr(0, before.size() - text.size());
        if (point == U'\n') {
            out += "\\n";
        } else if (point == U'\t') {
            out += "    ";
        } else if (point == invalid_code_point || point < 0x20 || point == 0x7f) {
            escape('x', as_bytes(taken));
        } else if (drives_the_screen(point)) {
            escape('u', std::array{static_cast<std::uint8_t>(point >> 8),
                                   static_cast<std::uint8_t>(point & 0xff)});
        } else {
            out += taken;
        }
    }
    return out;
}

// The number of code points, or nothing if `text` is not valid UTF-8.
inline std::optional<std::size_t> utf8_length(std::string_view text) {
    std::size_t count = 0;
    for (; !text.empty(); ++count)
        if (take_code_point(text) == invalid_code_point) return std::nullopt;
    return count;
}

// User names: [a-z0-9][a-z0-9_.-]{0,31}. Few characters on purpose: no name can look like another
// (no Cyrillic "a"), break a line of users.db, or climb out of a directory. And nobody has a name
// that front ends use themselves, as in "you -> bob: text": you, everyone, everybody.
inline constexpr std::size_t max_name_bytes = 32;
inline bool is_reserved_name(std::string_view name) {
    return name == "you" || name == "everyone" || name == "everybody";
}
// The form alone. Files may hold lines of those who were called so before the names were reserved:
// they are read and kept, so that they are in nobody's way, but nobody logs in with such a name.
inline bool has_form_of_name(std::string_view name) {
    auto letter_or_digit = [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9'); };
    return !name.empty() && name.size() <= max_name_bytes && letter_or_digit(name[0]) &&
           std::all_of(name.begin(), name.end(), [&](char c) {
               return letter_or_digit(c) || c == '_' || c == '.' || c == '-';
           });
}
inline bool is_valid_name(std::string_view name) {
    return has_form_of_name(name) && !is_reserved_name(name);
}

// With small letters for A to Z, and nothing else changed.
inline std::string lower_case(std::string_view text) {
    std::string lower(text);
    for (char& c : lower)
        if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    return lower;
}

// `name` in lower case. Throws Error, with the rule, if it is no valid user name.
inline std::string fold_name(std::string_view name) {
    std::string folded = lower_case(name);
    if (is_reserved_name(folded))
        throw Error(concat("Nobody can be called \"", folded,
                           "\": it would look as if the program said it. Choose another name."));
    if (!is_valid_name(folded))
        throw Error(concat("\"", visible(name.substr(0, 64)),
                           "\" cannot be a user name. A name has 1 to 32 characters: letters a-z, "
                           "digits, and after the first one also _ . and -"));
    return folded;
}

// The words of a line, split at white space.
inline std::vector<std::string> split_words(std::string_view line) {
    std::vector<std::string> words;
    std::istringstream in{std::string(line)};
    for (std::string word; in >> word;) words.push_back(word);
    return words;
}

// The number that a text is: digits and nothing else, no sign, no blanks. Nothing if it is
// something else, or does not fit into a T.
template <std::unsigned_integral T>
std::optional<T> parse_number(std::string_view text) {
    T number{};
    const char* end = text.data() + text.size();
    std::from_chars_result result = std::from_chars(text.data(), end, number);
    if (result.ec != std::errc{} || result.ptr != end) return std::nullopt;
    return number;
}

// ---- Files that survive a crash -----------------------------------------------------------------
//
// Writing over a file is not atomic: a crash in the middle leaves half of the new one. So:
//
//      1. write everything into a new file beside it
//      2. fsync the new file           (now its bytes are on the disk, not only in the cache)
//      3. rename it over the old one   (atomic: a reader sees the old file or the new one)
//      4. fsync the directory          (now the rename itself is on the disk)
//
// Files with secrets are created with mode 0600. Setting the mode afterwards leaves an instant in
// which others can open the file, and an open file stays open.

enum class FileMode { readable_by_all, owner_only };

// The path that a text names. All our texts are UTF-8, and a path that is made of one directly
// takes it for the system's own encoding, which on Windows is another one.
inline std::filesystem::path path_of(std::string_view text) {
    return std::u8string(text.begin(), text.end());
}

inline std::string system_reason(int error = errno) {
    return std::generic_category().message(error);
}

namespace detail {

// What each system does in its own way: chapter 14. What fails returns a negative number (or
// false), and errno says why.

inline int open_file(const std::filesystem::path& path, bool create, FileMode mode);
inline void give_back_free_memory();  // what was freed and is kept for the next time
inline int close_file(int file);
inline int sync_file(int file);  // returns when the bytes are on the disk itself
inline std::ptrdiff_t read_some(int file, ByteSpan into);  // how many bytes; 0: the end of the file
inline std::ptrdiff_t write_some_at(int file, ByteView bytes, std::uint64_t offset);  // likewise
inline int rename_over(const std::filesystem::path& from, const std::filesystem::path& to);
inline bool sync_directory(const std::filesystem::path& directory);
// Throws Error; with the sentence `busy` if another process holds the directory and not `wait`.
inline std::intptr_t lock_directory(const std::filesystem::path& directory, bool wait,
                                    std::string_view busy);
inline void unlock_directory(std::intptr_t lock);
inline constexpr std::chrono::seconds lock_patience{5};
inline bool may_write_into(const std::filesystem::path& directory);

// Runs a function when the scope is left, however it is left.
template <class F>
class AtExit {
  public:
    explicit AtExit(F function) : function_(std::move(function)) {}
    ~AtExit() { function_(); }
    AtExit(const AtExit&) = delete;
    AtExit& operator=(const AtExit&) = delete;

  private:
    F function_;
};

inline std::filesystem::path directory_of(const std::filesystem::path& path) {
    return path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
}

}  // namespace detail

// The whole content of a file, at most `max_size` bytes; nothing if there is no such file. Throws
// Error if it is there and cannot be read. The content may be secret, so it wipes itself.
inline std::optional<SecretBytes> read_file(const std::filesystem::path& path,
                                            std::size_t max_size) {
    int file = detail::open_file(path, false, FileMode::readable_by_all);
    if (file < 0 && errno == ENOENT) return std::nullopt;
    if (file < 0) throw Error(concat("Cannot read ", path.string(), ": ", system_reason(), "."));
    detail::AtExit close([&] { detail::close_file(file); });
    SecretBytes content;
    for (std::array<std::uint8_t, 16384> block;;) {
        std::ptrdiff_t got = detail::read_some(file, block);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) throw Error(concat("Cannot read ", path.string(), ": ", system_reason(), "."));
        content.insert(content.end(), block.begin(), block.begin() + got);
        OPENSSL_cleanse(block.data(), block.size());
        if (got == 0) return content;
        if (content.size() > max_size)
            throw Error(concat(path.string(), " is larger than ", max_size, " bytes."));
    }
}

namespace detail {
// Writes all of `bytes`. False if that fails, and errno says why.
inline bool write_all_at(int file, ByteView bytes, std::uint64_t offset) {
    while (!bytes.empty()) {
        std::ptrdiff_t wrote = write_some_at(file, bytes, offset);
        if (wrote < 0 && errno == EINTR) continue;
        if (wrote < 0) return false;
        offset += static_cast<std::uint64_t>(wrote);
        bytes = bytes.subspan(static_cast<std::size_t>(wrote));
    }
    return true;
}
}  // namespace detail

// Replaces (or creates) a file in one atomic, durable step. Throws Error; then the old file is
// untouched.
inline void write_file(const std::filesystem::path& path, ByteView content, FileMode mode) {
    std::filesystem::path fresh = path;
    fresh += ".new";
    auto fail = [&](std::string_view step) {
        std::string reason = system_reason();
        std::error_code ignored;
        std::filesystem::remove(fresh, ignored);
        throw Error(concat("Cannot write ", path.string(), " (", step, "): ", reason, "."));
    };
    std::error_code ignored;
    std::filesystem::remove(fresh, ignored);  // left behind by a crash
    int file = detail::open_file(fresh, true, mode);
    if (file < 0) fail("create");
    {
        detail::AtExit close([&] { detail::close_file(file); });
        if (!detail::write_all_at(file, content, 0)) fail("write");
        if (detail::sync_file(file) != 0) fail("fsync");
    }
    if (detail::rename_over(fresh, path) != 0) fail("rename");
    // If this fails, the new file is there all the same, and nobody can do more about it.
    (void)detail::sync_directory(detail::directory_of(path));
}

// Gives the words of each line of a file to `handle`, which throws Error for what it cannot accept;
// it is thrown on with the file, the number of the line, and `advice`. Empty lines and comments (#)
// are left out. Returns the file's content; nothing if there is no such file.
inline std::optional<SecretBytes> read_lines(
    const std::filesystem::path& path, std::size_t max_size, std::string_view advice,
    const std::function<void(const std::vector<std::string>& words)>& handle) {
    std::optional<SecretBytes> content = read_file(path, max_size);
    std::istringstream in{content ? to_string(*content) : ""};
    std::string line;
    for (int number = 1; std::getline(in, line); ++number) {
        std::vector<std::string> words = split_words(line);
        if (words.empty() || words[0].starts_with('#')) continue;
        try {
            handle(words);
        } catch (const Error& e) {
            throw Error(concat(path.string(), ", line ", number, ": ", e.what(), " ", advice));
        }
    }
    return content;
}

// Creates a directory, and those above it, for the owner alone. No error if it exists.
inline void make_private_directory(const std::filesystem::path& path) {
    std::error_code failure;
    bool made = std::filesystem::create_directories(path, failure);
    if (!failure && made)
        std::filesystem::permissions(path, std::filesystem::perms::owner_all, failure);
    if (failure)
        throw Error(
            concat("Cannot create the directory ", path.string(), ": ", failure.message(), "."));
}

// Holds a directory for this process, so that two programs never write the same files. The lock
// is on the directory itself: it leaves no file behind, and it ends with the process, however
// the process ends.
class DirectoryLock {
  public:
    // Throws Error if `directory` does not exist; and if another process holds it, with the
    // sentence `busy`, at once or, when `wait` is true, after five seconds.
    DirectoryLock(const std::filesystem::path& directory, bool wait, std::string_view busy)
        : lock_(detail::lock_directory(directory, wait, busy)) {}
    ~DirectoryLock() { detail::unlock_directory(lock_); }
    DirectoryLock(const DirectoryLock&) = delete;
    DirectoryLock& operator=(const DirectoryLock&) = delete;

  private:
    std::intptr_t lock_;
};

// ---- Looking on ---------------------------------------------------------------------------------
//
// Each layer can be watched at work. Whoever starts a server or a client may give it a Tracer, and
// the layers tell it what they do, with the bytes. Nearly always there is none, and then nothing is
// computed for it. What the bytes mean is said in chapter 13, where --trace is made of this.

struct TraceEvent {
    enum class Layer {
        stream,     // what one call took from the socket, or gave to it
        handshake,  // a frame of the handshake
        record,     // a sealed record, and its plaintext
        message,    // one message of those in a record
        payload,    // what is sealed for somebody, and its plaintext: kind and body
        room_text,  // the same for a room message: the text
        secret,     // a key, or what a key is made of: never shown unless somebody asks for it
    } layer{};
    enum class Way { in, out, none } way = Way::none;
    ByteView wire{};           // as it travels; of a secret: what it is derived from, if that helps
    ByteView plain{};          // what is inside; the secret
    std::string_view name{};   // the key that sealed it; what the secret is
    std::uint64_t number = 0;  // of the frame, the record, or the payload on its lane
};
using Tracer = std::function<void(const TraceEvent&)>;
using TracerFor = std::function<Tracer(std::string_view who)>;  // one that says whom it watches

// ---- Try it -------------------------------------------------------------------------------------
//
// Break: length-believed (a reader believes a length that comes from the network) and old-file-lost
// (a file is removed before the new one is there). Which of them needs an enemy, and which one only
// a Tuesday?
//
// Write a VARINT, a number that takes as many bytes as it needs:
//
//      void put_varint(Writer& to, std::uint64_t number)
//      std::uint64_t take_varint(Reader& from)                 // throws ProtocolError
//
// Each byte carries seven bits, the lowest seven first; its highest bit says whether another byte
// follows. 0 is 00, 127 is 7f, 128 is 80 01, 300 is ac 02, and the largest number takes ten bytes.
// Refuse what is cut short, what does not fit into 64 bits, and a second spelling: 80 00 is 0, too,
// with a last byte that says nothing.
// Green: exercise: varint

// =================================================================================================
//  Chapter 2. Sockets
// =================================================================================================
//
// A TCP connection is a pair of byte streams, one in each direction. The operating system hands
// out a number (a descriptor) for it. The life of a connection:
//
//      server: socket() -> bind(address) -> listen() -> accept() --+
//      client: socket() -> connect(address) -----------------------+--> send(), recv() ... close()
//
// What goes wrong, and why this chapter is longer than those four calls:
//
//   - connect() is done when the other KERNEL has answered, by TCP's handshake of three packets. No
//     program need have accepted the connection yet, and who it is, nobody has said.
//   - recv() returns SOME bytes, not the bytes you wanted; send() takes SOME, not all.
//   - A peer that vanishes (power cut, laptop lid) sends nothing, not even an end. Without a time
//     limit, recv() waits for ever. TCP keep-alive and our own pings find out.
//   - Writing to a connection whose other end is closed kills the process with SIGPIPE, unless one
//     asks for an error instead.
//   - A name may have several addresses (IPv6 and IPv4), of which only one may answer.
//   - A thread that waits in accept() or recv() must be woken when the program wants to end.
//     Closing the descriptor under its feet is a race: the number may be reused at once by another
//     thread's socket. We shut the connection DOWN (the waiting thread sees the end of the stream)
//     and close it when nobody uses it any more.
//
// Nothing here is encrypted, and nothing here knows where a message ends.

// ---- What the system gives us -------------------------------------------------------------------

namespace detail {

using SocketHandle = decltype(::socket(0, 0, 0));  // a number: a small one on POSIX
inline constexpr SocketHandle no_socket = static_cast<SocketHandle>(-1);
using PollEntry = ::pollfd;

// What each system does in its own way: chapter 14.

inline void start_socket_library();          // before anything else
inline void prepare_socket(SocketHandle s);  // a new one: never blocks, no SIGPIPE, no heirs
inline void close_socket(SocketHandle s);
inline void shut_down_both(SocketHandle s);     // both directions end at once
inline void shut_down_writing(SocketHandle s);  // ours ends when everything before it was sent
inline void keep_system_queue_short(SocketHandle s);
inline void allow_quick_restart(SocketHandle s);       // of a listener
inline std::array<SocketHandle, 2> make_waker_ends();  // what is sent at [1] arrives at [0]

// Both return how many bytes it were, or a negative number: then socket_error() says why.
inline std::ptrdiff_t receive_some(SocketHandle s, ByteSpan into);
inline std::ptrdiff_t send_some(SocketHandle s, ByteView bytes);
// Waits until something happens on one of them, or for `timeout_ms` (-1: for ever); returns on how
// many, or a negative number.
inline int poll_sockets(std::span<PollEntry> entries, int timeout_ms);

// Of the last call in this thread that failed; and what such a number means.
inline int socket_error();
inline bool would_block(int error);
inline bool in_progress(int error);  // connect() has begun
inline bool interrupted(int error);  // by a signal: try again
inline bool out_of_descriptors(int error);
inline bool address_in_use(int error);
inline bool not_our_address(int error);
inline std::string socket_reason(int error);
inline std::string lookup_reason(int failure);  // of getaddrinfo()

struct AddressNotHere : NetworkError {  // this machine does not have the address, or its family
    using NetworkError::NetworkError;
};
// "WHAT: the system's reason." and what to do about it.
[[noreturn]] inline void throw_socket_error(const std::string& what, int error = socket_error(),
                                            std::string_view advice = "") {
    std::string sentence = concat(what, ": ", socket_reason(error), ".", advice);
    if (not_our_address(error)) throw AddressNotHere(sentence);
    throw NetworkError(sentence);
}

template <class T>
void set_option(SocketHandle s, int level, int name, const T& value) {
    ::setsockopt(s, level, name, reinterpret_cast<const char*>(&value),
                 static_cast<socklen_t>(sizeof value));  // each is a wish: none is vital
}

}  // namespace detail

using Clock = std::chrono::steady_clock;  // never jumps, unlike the time of day
using Milliseconds = std::chrono::milliseconds;

// ---- Addresses ----------------------------------------------------------------------------------

struct Endpoint {  // one IPv4 or IPv6 address with its port, as the system keeps it
    sockaddr_storage storage{};
    socklen_t size = 0;

    const sockaddr* address() const { return reinterpret_cast<const sockaddr*>(&storage); }
    sockaddr* address() { return reinterpret_cast<sockaddr*>(&storage); }

    // The host alone ("127.0.0.1", "::1"), or with the port ("127.0.0.1:5000", "[::1]:5000").
    std::string host() const { return numeric().first; }
    std::uint16_t port() const { return parse_number<std::uint16_t>(numeric().second).value_or(0); }
    std::string text() const {
        auto [host, port] = numeric();
        bool ipv6 = host.find(':') != host.npos;
        return concat(ipv6 ? "[" : "", host, ipv6 ? "]:" : ":", port);
    }

  private:
    std::pair<std::string, std::string> numeric() const {
        std::array<char, 128> host{};
        std::array<char, 16> port{};
        ::getnameinfo(address(), size, host.data(), static_cast<socklen_t>(host.size()),
                      port.data(), static_cast<socklen_t>(port.size()),
                      NI_NUMERICHOST | NI_NUMERICSERV);
        return {host.data(), port.data()};
    }
};

// All addresses of a host, in the order in which the system advises to try them (RFC 6724). For a
// listener (`passive`) the host is one of our own. May block for seconds while a name server is
// asked; throws NetworkError.
inline std::vector<Endpoint> resolve(const std::string& host, std::uint16_t port, bool passive) {
    detail::start_socket_library();
    addrinfo hints{};
    hints.ai_family = AF_UNSPEC;  // IPv4 or IPv6
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_NUMERICSERV | (passive ? AI_PASSIVE : 0);
    addrinfo* found = nullptr;
    int failure = ::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
    if (failure != 0)
        throw NetworkError(concat("Cannot find the host \"", visible(host),
                                  "\": ", detail::lookup_reason(failure), "."));
    detail::AtExit release([&] { ::freeaddrinfo(found); });
    std::vector<Endpoint> endpoints;
    for (const addrinfo* a = found; a != nullptr; a = a->ai_next) {
        Endpoint& endpoint = endpoints.emplace_back();
        std::memcpy(&endpoint.storage, a->ai_addr, a->ai_addrlen);
        endpoint.size = static_cast<socklen_t>(a->ai_addrlen);
    }
    return endpoints;
}

// ---- The socket ---------------------------------------------------------------------------------

namespace detail {

// Blocks until one of the sockets has what its entry asks for: then true; or until `deadline` is
// over (time_point::max(): never).
inline bool poll_until(std::span<PollEntry> entries, Clock::time_point deadline) {
    constexpr Milliseconds longest = std::chrono::hours(1);  // poll() counts in an int
    for (;;) {
        auto left = std::clamp(std::chrono::ceil<Milliseconds>(deadline - Clock::now()),
                               Milliseconds(0), longest);
        int ready = poll_sockets(entries, static_cast<int>(left.count()));
        if (ready > 0) return true;
        if (ready < 0 && !interrupted(socket_error())) throw_socket_error("Cannot wait");
        if (Clock::now() >= deadline) return false;
    }
}

}  // namespace detail

// One connection (or one listening socket); closes it when destroyed. No system call on it blocks:
// who has to wait waits in poll(), where a time limit and other events are heard too. Any thread
// may call shut_down(); one thread at a time may read, and one may write.
class Socket {
  public:
    Socket() = default;
    explicit Socket(detail::SocketHandle handle) : handle_(handle) {
        if (is_open()) detail::prepare_socket(handle_);
    }
    Socket(Socket&& other) noexcept { *this = std::move(other); }
    Socket& operator=(Socket&& other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    ~Socket() {
        if (is_open()) detail::close_socket(handle_);
    }

    bool is_open() const { return handle_ != detail::no_socket; }
    detail::SocketHandle handle() const { return handle_; }

    // How many bytes were read; 0 means that the other side has ended the stream, and nothing that
    // none are there at the moment. Does not block. Throws NetworkError.
    std::optional<std::size_t> read_now(ByteSpan into) {
        std::ptrdiff_t got = detail::receive_some(handle_, into);
        if (got >= 0) return static_cast<std::size_t>(got);
        return nothing_now<std::optional<std::size_t>>(std::nullopt);
    }
    // How many bytes the operating system has taken (which are not yet with the other side): some,
    // all, or 0 if it takes none at the moment. Does not block. Throws NetworkError.
    std::size_t write_now(ByteView bytes) {
        std::ptrdiff_t sent = detail::send_some(handle_, bytes);
        if (sent >= 0) return static_cast<std::size_t>(sent);
        return nothing_now<std::size_t>(0);
    }

    // Blocks until the operating system has taken every byte. Throws TimedOut if the other side
    // takes nothing for as long as `patience`, or NetworkError.
    void write_all(ByteView bytes, Milliseconds patience) {
        for (;;) {
            bytes = bytes.subspan(write_now(bytes));
            if (bytes.empty()) return;
            if (!wait(POLLOUT, Clock::now() + patience))
                throw TimedOut("The other side takes no more data.");
        }
    }
    // Blocks until the socket can be read (POLLIN) or written (POLLOUT), has failed, or was shut
    // down; false when the time is over. No events: waits for the last two only.
    bool wait(short events, Clock::time_point deadline) const {
        std::array<detail::PollEntry, 1> entry{{{handle_, events, 0}}};
        return detail::poll_until(entry, deadline);
    }

    // Ends both streams at once. Whoever waits for this socket returns or throws.
    void shut_down() noexcept { detail::shut_down_both(handle_); }
    // Ends our stream; the other side can still send ("half close").
    void finish_writing() noexcept { detail::shut_down_writing(handle_); }

    // Reads (away) what the other side still sends, until it ends its stream too or the time is
    // over. That makes an end polite: closing at once while unread data is there makes the system
    // send a reset, and a reset destroys our last words on their way: the other side would never
    // see the goodbye. Blocks. Throws NetworkError.
    void read_away(Clock::time_point deadline) {
        std::array<std::uint8_t, 4096> discarded;
        while (Clock::now() < deadline) {
            std::optional<std::size_t> got = read_now(discarded);
            if (got == std::size_t{0}) return;
            if (!got) wait(POLLIN, deadline);
        }
    }

    // For a chat: send small packets at once. (Nagle's algorithm would hold them back, up to 40 ms,
    // while earlier bytes are not acknowledged, so that many small ones become one: good for who
    // writes in small pieces and waits for no answer, bad for who does.) Let the system notice when
    // the other machine is gone. And keep what waits to be sent in our own queue, where chat can
    // overtake file data (chapter 10): once it is in the system's buffer, which may hold megabytes,
    // nothing overtakes it any more.
    void set_chat_options() {
        detail::set_option(handle_, IPPROTO_TCP, TCP_NODELAY, 1);
        detail::set_option(handle_, SOL_SOCKET, SO_KEEPALIVE, 1);
        detail::keep_system_queue_short(handle_);
    }

    Endpoint local_endpoint() const {
        Endpoint endpoint;
        endpoint.size = static_cast<socklen_t>(sizeof endpoint.storage);
        if (::getsockname(handle_, endpoint.address(), &endpoint.size) != 0) endpoint.size = 0;
        return endpoint;
    }

  private:
    // `nothing` if the call that has failed could only not be done at once; else throws.
    template <class T>
    static T nothing_now(T nothing) {
        int error = detail::socket_error();
        if (detail::would_block(error) || detail::interrupted(error)) return nothing;
        detail::throw_socket_error("The connection broke", error);
    }
    detail::SocketHandle handle_ = detail::no_socket;
};

// Wakes a thread that waits in poll(): two connected sockets, of which one end is among those that
// poll() watches (the "self-pipe trick"). wake() only sends one byte, so that even a signal handler
// may call it (a handler may do almost nothing else: POSIX lists the few functions that are
// "async-signal-safe", and send() is one of them).
class Waker {
  public:
    Waker() {
        detail::start_socket_library();
        std::array<detail::SocketHandle, 2> ends = detail::make_waker_ends();
        read_ = ends[0];
        write_ = ends[1];
    }
    Waker(const Waker&) = delete;
    Waker& operator=(const Waker&) = delete;
    ~Waker() {
        detail::close_socket(read_);
        if (write_ != read_) detail::close_socket(write_);
    }

    void wake() noexcept {
        int saved = errno;  // a signal handler must not disturb the code that it interrupts
        detail::send_some(write_, std::array<std::uint8_t, 1>{});  // if it is full, it is awake
        errno = saved;
    }
    // Forgets past wake() calls.
    void drain() noexcept {
        std::array<std::uint8_t, 64> bytes{};
        while (detail::receive_some(read_, bytes) > 0) {
        }
    }
    detail::SocketHandle handle() const { return read_; }  // readable after wake()

  private:
    detail::SocketHandle read_ = detail::no_socket, write_ = detail::no_socket;
};

namespace detail {

inline Socket new_socket(const Endpoint& endpoint) {
    SocketHandle handle = ::socket(endpoint.storage.ss_family, SOCK_STREAM, 0);
    if (handle == no_socket) throw_socket_error("Cannot create a socket");
    return Socket(handle);
}

// First an address of each family, then the second of each, and so on: where one family does not
// work, the other one's turn comes soon.
inline void alternate_families(std::vector<Endpoint>& endpoints) {
    std::map<int, std::size_t> seen;
    std::vector<std::pair<std::size_t, Endpoint>> numbered;
    for (const Endpoint& endpoint : endpoints)
        numbered.emplace_back(seen[endpoint.storage.ss_family]++, endpoint);
    std::stable_sort(numbered.begin(), numbered.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    for (std::size_t i = 0; i < endpoints.size(); ++i) endpoints[i] = numbered[i].second;
}

// Why an attempt to connect has failed; empty if it has not. For a socket that poll() announced.
inline std::string connect_failure(const Socket& socket) {
    int error = 0;
    socklen_t size = sizeof error;
    ::getsockopt(socket.handle(), SOL_SOCKET, SO_ERROR, reinterpret_cast<char*>(&error), &size);
    return error == 0 ? "" : socket_reason(error);
}

// Connects to one of several addresses, the first that answers. An address that is dead mostly says
// nothing at all, so nobody waits for its time to be over: after a short head start the next one is
// tried beside it ("happy eyeballs", RFC 8305; the 250 ms are from its section 8), and at once when
// an attempt fails. connect() only begins each; poll() waits for all of them, until the time is
// over, or until `cancel`. Throws NetworkError with the reason of the attempt that failed last.
inline Socket connect_to_any(const std::vector<Endpoint>& endpoints, Milliseconds timeout,
                             const Waker& cancel) {
    constexpr Milliseconds head_start{250};
    std::string reason = "it has no address";
    std::vector<Socket> attempts;
    auto next = endpoints.begin();
    const Clock::time_point deadline = Clock::now() + timeout;
    Clock::time_point next_start = Clock::now();
    while (next != endpoints.end() || !attempts.empty()) {
        if (next != endpoints.end() && (attempts.empty() || Clock::now() >= next_start)) {
            const Endpoint& endpoint = *next++;
            try {
                Socket socket = new_socket(endpoint);
                if (::connect(socket.handle(), endpoint.address(), endpoint.size) == 0)
                    return socket;
                if (!in_progress(socket_error())) throw NetworkError(socket_reason(socket_error()));
                attempts.push_back(std::move(socket));
                next_start = Clock::now() + head_start;
            } catch (const NetworkError& e) {
                reason = e.what();
                continue;
            }
        }
        std::vector<PollEntry> entries{{cancel.handle(), POLLIN, 0}};
        for (const Socket& socket : attempts) entries.push_back({socket.handle(), POLLOUT, 0});
        poll_until(entries, next == endpoints.end() ? deadline : std::min(next_start, deadline));
        if (entries[0].revents != 0) throw NetworkError("cancelled");
        for (std::size_t i = attempts.size(); i-- > 0;) {
            if (entries[i + 1].revents == 0) continue;
            std::string failure = connect_failure(attempts[i]);
            if (failure.empty()) return std::move(attempts[i]);
            reason = failure;
            attempts.erase(attempts.begin() + static_cast<std::ptrdiff_t>(i));
            next_start = Clock::now();
        }
        if (Clock::now() >= deadline) throw TimedOut("no answer");
    }
    throw NetworkError(reason);
}

}  // namespace detail

// Connects to the first address of `host` that answers within `timeout`. Blocks; `cancel` ends the
// wait early. Throws CannotConnect with the reason of the attempt that failed last, and
// NetworkError if no address is known.
inline Socket connect_to(const std::string& host, std::uint16_t port, Milliseconds timeout,
                         const Waker& cancel) {
    std::vector<Endpoint> endpoints = resolve(host, port, false);
    detail::alternate_families(endpoints);
    try {
        Socket socket = detail::connect_to_any(endpoints, timeout, cancel);
        socket.set_chat_options();
        return socket;
    } catch (const NetworkError& e) {
        throw CannotConnect(
            concat("Cannot connect to ", visible(host), " port ", port, ": ", e.what(), "."));
    }
}

// The listening side: one socket for each address of `host` ("localhost" has two).
class Listener {
  public:
    // Port 0 lets the system choose a free one: see port(). Throws NetworkError.
    Listener(const std::string& host, std::uint16_t port) : port_(port) {
        std::string reason;
        for (Endpoint& endpoint : resolve(host, port, true)) {
            if (!sockets_.empty()) set_port(endpoint, port_);
            try {
                sockets_.push_back(listen_on(endpoint, host));
                port_ = sockets_.back().local_endpoint().port();
            } catch (const detail::AddressNotHere& e) {
                reason = e.what();  // "localhost" has an IPv6 address, this machine no IPv6
            }
        }
        if (sockets_.empty()) throw NetworkError(reason);
        reserve_ = detail::new_socket(sockets_.front().local_endpoint());
    }

    std::uint16_t port() const { return port_; }
    std::vector<std::string> addresses() const {
        std::vector<std::string> texts;
        for (const Socket& socket : sockets_) texts.push_back(socket.local_endpoint().text());
        return texts;
    }

    struct Accepted {
        Socket socket;
        Endpoint from;
    };
    // Blocks until somebody connects, or `waker` wakes (then returns nothing). Out of descriptors,
    // a newcomer is turned away and NetworkError thrown; those who are connected do not notice.
    std::optional<Accepted> accept(const Waker& waker) {
        std::vector<detail::PollEntry> entries{{waker.handle(), POLLIN, 0}};
        for (const Socket& socket : sockets_) entries.push_back({socket.handle(), POLLIN, 0});
        detail::poll_until(entries, Clock::time_point::max());
        if (entries[0].revents != 0) return std::nullopt;
        for (std::size_t i = 1; i < entries.size(); ++i)
            if (entries[i].revents != 0) return accept_from(sockets_[i - 1]);
        return std::nullopt;
    }

  private:
    static void set_port(Endpoint& endpoint, std::uint16_t port) {
        std::uint16_t network_order = htons(port);
        if (endpoint.storage.ss_family == AF_INET6)
            reinterpret_cast<sockaddr_in6*>(&endpoint.storage)->sin6_port = network_order;
        else
            reinterpret_cast<sockaddr_in*>(&endpoint.storage)->sin_port = network_order;
    }

    static Socket listen_on(const Endpoint& endpoint, const std::string& host) {
        Socket socket = detail::new_socket(endpoint);
        detail::allow_quick_restart(socket.handle());
        if (endpoint.storage.ss_family == AF_INET6)  // "::" listens for IPv4 as well, others do not
            detail::set_option(socket.handle(), IPPROTO_IPV6, IPV6_V6ONLY, host == "::" ? 0 : 1);
        if (::bind(socket.handle(), endpoint.address(), endpoint.size) != 0 ||
            ::listen(socket.handle(), SOMAXCONN) != 0) {
            int error = detail::socket_error();
            detail::throw_socket_error(
                concat("Cannot listen on ", endpoint.text()), error,
                detail::address_in_use(error)
                    ? " Another program uses this port: stop it, or choose another with --port."
                    : "");
        }
        return socket;
    }

    // The connection that poll() announced may be gone again before accept() is called; if that
    // blocked, it would wait for the next one, and the waker would not be heard.
    std::optional<Accepted> accept_from(const Socket& listening) {
        Endpoint from;
        from.size = static_cast<socklen_t>(sizeof from.storage);
        detail::SocketHandle handle = ::accept(listening.handle(), from.address(), &from.size);
        if (handle == detail::no_socket) {
            int error = detail::socket_error();
            if (!detail::out_of_descriptors(error)) return std::nullopt;  // aborted: nothing to do
            turn_one_away(listening);
            detail::throw_socket_error("A newcomer was turned away", error);
        }
        Socket socket(handle);
        socket.set_chat_options();
        return Accepted{std::move(socket), from};
    }

    // With no descriptor left we cannot even accept in order to close, and poll() would report the
    // waiting newcomer for ever, at full speed. So one descriptor is kept in reserve: give it up,
    // accept, close, take it back.
    void turn_one_away(const Socket& listening) {
        reserve_ = Socket();
        Socket newcomer(::accept(listening.handle(), nullptr, nullptr));
        newcomer = Socket();
        try {
            reserve_ = detail::new_socket(listening.local_endpoint());
        } catch (const NetworkError&) {
            // somebody else was faster: the next newcomer waits until a descriptor is free
        }
    }

    std::vector<Socket> sockets_;
    Socket reserve_;
    std::uint16_t port_;
};

// ---- Try it -------------------------------------------------------------------------------------
//
// Break: nagle-left-on (small packets wait for others to travel with). Nobody loses a byte by it.
// Who notices, and of what?
//
// Write an ECHO server's conversation: what comes is sent back, as it comes. When the other side
// ends its stream, end ours, and return. A burst of some megabytes must come back, too, to somebody
// who reads while they write, and nothing may spin while nothing comes.
//
//      void echo(Socket& socket)
//
// Green: exercise: echo

// =================================================================================================
//  Chapter 3. Framing
// =================================================================================================
//
// TCP is a stream without edges. You send "hello" and "world"; the other side may receive "hellowo"
// and, a second later, "rld". It is entirely possible that we read just half a message, or three
// and a half. So before each message goes its length:
//
//      +----------------+------------------------+
//      | u32 length     | that many bytes        |      a frame
//      +----------------+------------------------+
//
// What goes wrong without it: a program that takes what one recv() returns for one message. It
// works on the programmer's machine, where messages are short and nothing is under way between two
// programs, and fails on the first slow line, or when two messages are sent at once.
//
// Two traps. The length comes from a stranger: "4 GiB follow" must not make us allocate 4 GiB, so
// every call says how much it is prepared to take, and the check comes before the allocation; a
// frame that is longer ends the connection, for nobody can find the beginning of the next one. And
// a system call for every little piece is slow: we read as much as there is into a buffer, and cut
// frames out of it.
//
// What framing does not protect against: anything at all. Whoever can write into the stream can
// write a length. Chapter 5 makes that noticeable.

inline constexpr std::size_t frame_header_bytes = 4;

// The length that a frame announces in its first four bytes. Throws ProtocolError over `limit`.
inline std::size_t frame_length(ByteView header, std::size_t limit) {
    std::uint32_t length{};
    Reader(header.first(frame_header_bytes), "a frame header")(length);
    if (length > limit)
        throw ProtocolError(concat("Received a frame of ", length, " bytes where at most ", limit,
                                   " are allowed. Is the other side a ChatSecure program?"));
    return length;
}

// The four bytes that go before `length` bytes of content.
inline std::array<std::uint8_t, frame_header_bytes> frame_header(std::size_t length) {
    return {static_cast<std::uint8_t>(length >> 24), static_cast<std::uint8_t>(length >> 16),
            static_cast<std::uint8_t>(length >> 8), static_cast<std::uint8_t>(length)};
}
inline Bytes make_frame(ByteView content) { return join(frame_header(content.size()), content); }

// Cuts a socket's stream into frames. One thread uses it.
class FrameReader {
  public:
    // `socket` must outlive the reader. `largest` bounds every frame that will ever be asked for.
    FrameReader(Socket& socket, std::size_t largest)
        : socket_(socket), largest_(frame_header_bytes + largest) {}

    // The content of the next frame if all of it has been read: valid, and yours to change, until
    // the next call of any function. Throws ProtocolError for a frame longer than `limit`.
    std::optional<ByteSpan> take(std::size_t limit) {
        if (end_ - begin_ < frame_header_bytes) return std::nullopt;
        std::size_t length = frame_length({buffer_.get() + begin_, frame_header_bytes}, limit);
        if (end_ - begin_ < frame_header_bytes + length) return std::nullopt;
        ByteSpan content{buffer_.get() + begin_ + frame_header_bytes, length};
        begin_ += frame_header_bytes + length;
        return content;
    }

    enum class Got { some, nothing_now, the_end };
    // Reads what is there. Does not block. Throws NetworkError, also for an end inside a frame.
    Got read_now() {
        if (std::exchange(drained_, false)) return Got::nothing_now;  // as the last read has shown
        make_room();
        std::optional<std::size_t> got = socket_.read_now({buffer_.get() + end_, capacity_ - end_});
        if (!got) return Got::nothing_now;
        if (*got == 0 && begin_ == end_) return Got::the_end;
        if (*got == 0) throw NetworkError("The connection ended in the middle of a message.");
        if (trace)
            trace({TraceEvent::Layer::stream, TraceEvent::Way::in, {buffer_.get() + end_, *got}});
        end_ += *got;
        drained_ = end_ < capacity_;
        return Got::some;
    }

    // The next frame, or nothing if the stream ended between two frames. Blocks. Throws as take()
    // and read_now() do, and TimedOut when `deadline` is over (what has come so far is kept: call
    // again). The deadline is for the whole frame: a time limit for each recv() alone would let a
    // stranger hold a thread for ever by sending one byte a second.
    std::optional<ByteSpan> next(std::size_t limit,
                                 Clock::time_point deadline = Clock::time_point::max()) {
        for (;;) {
            if (std::optional<ByteSpan> frame = take(limit)) return frame;
            if (Clock::now() >= deadline) throw TimedOut("The other side took too long.");
            Got got = read_now();
            if (got == Got::the_end) return std::nullopt;
            if (got == Got::some) continue;
            socket_.wait(POLLIN, deadline);
        }
    }

    Tracer trace;  // set before anything is read

    // Gives back the memory that a burst needed. For times of silence.
    void shrink() {
        if (begin_ != end_ || capacity_ == smallest_) return;
        buffer_.reset();
        begin_ = end_ = capacity_ = 0;
    }

  private:
    // A buffer that was filled to its end was too small, or a frame needs more than is left. It
    // grows up to two of the largest frames, so that one can be read while another is being used.
    void make_room() {
        if (begin_ == end_) begin_ = end_ = 0;
        bool full = end_ == capacity_;
        if (full && capacity_ < 2 * largest_) {
            std::size_t larger = std::min(std::max(smallest_, 2 * capacity_), 2 * largest_);
            std::unique_ptr<std::uint8_t[]> buffer(new std::uint8_t[larger]);  // not zeroed
            std::copy(buffer_.get() + begin_, buffer_.get() + end_, buffer.get());
            buffer_ = std::move(buffer);
            capacity_ = larger;
        } else if (full) {
            std::memmove(buffer_.get(), buffer_.get() + begin_, end_ - begin_);
        } else {
            return;
        }
        end_ -= begin_;
        begin_ = 0;
    }

    static constexpr std::size_t smallest_ = 2048;
    Socket& socket_;
    const std::size_t largest_;
    std::unique_ptr<std::uint8_t[]> buffer_;
    std::size_t capacity_ = 0;
    std::size_t begin_ = 0, end_ = 0;  // the bytes that are read and not yet handed out
    bool drained_ = false;             // the last read took less than there was room for
};

// ---- Try it -------------------------------------------------------------------------------------
//
// Break: frame-of-any-size (a stranger says how much memory is taken for what they announce) and
// deadline-for-each-byte (whoever sends a byte now and then may go on for ever).
//
// Write a frame reader that has no socket, and is fed BYTE BY BYTE, as a microcontroller's would
// be:
//
//      class ByteFramer {
//        public:
//          explicit ByteFramer(std::size_t limit);
//          std::optional<Bytes> feed(std::uint8_t byte);  // a frame's content, at its last byte
//      };
//
// It throws ProtocolError with the fourth byte of a length over `limit`, before there is memory for
// it. Which frame is complete with its fourth byte already?
// Green: exercise: byte by byte

// =================================================================================================
//  Chapter 4. RSA and friends
// =================================================================================================
//
// The tools. All of them come from OpenSSL: nobody should write a cipher, a hash or a random
// generator, and the reason is not that the formulas are hard. It is that a right answer that takes
// a different time for different secrets is already a leak. What this chapter does is to wrap each
// tool so that it is hard to use wrongly:
//
//      tool           does                                        wrong use that does not compile
//      -------------  ------------------------------------------  --------------------------------
//      random_bytes   unpredictable bytes                         -
//      RSA-OAEP       encapsulates a secret of up to some         a label left out
//                     hundred bytes for who has the private key
//      RSA-PSS        signs; everybody can check                  checking with a private key
//      X25519         two public keys -> one shared secret        sending the private half
//      HKDF           one secret -> as many keys as needed        two keys with the same label
//      AES-256-GCM    encrypts and authenticates any amount       a nonce that is no counter
//
// Why so many? RSA encrypts KEYS, never messages: RSA-OAEP fits 318 bytes into a 3072-bit key and
// costs a millisecond to open; AES-256-GCM has no limit and costs about a nanosecond for four
// bytes. And RSA alone would be a time bomb: who records today's traffic and steals the key
// tomorrow, reads it all. X25519 keys are made for one connection and thrown away, so there is
// nothing left to steal ("forward secrecy"). One construction serves both layers of this program:
//
//      agree(initiator, responder):
//          the initiator draws 32 random bytes and sends them, encapsulated under the responder's
//          long-lived key, and both sides mix that secret with an ephemeral X25519 exchange:
//
//              prk = HKDF-Extract(salt = transcript hash, ikm = OAEP secret || X25519 secret)
//
//          RSA says WHO can read. X25519 says that it is over when it is over.
//
// What goes wrong without care: a nonce that repeats under one key breaks AES-GCM completely (it
// reveals the XOR of two messages, and lets anybody forge). So Nonce can only be made from a
// counter, and the counters belong to the key.
//
// The parameters, for whoever writes it again: RSA keys of 2048 to 4096 bits with a public exponent
// from 65537 to 2^32 - 1, as SPKI in DER; OAEP and PSS with SHA-256 and MGF1 with SHA-256, PSS with
// a salt of 32 bytes; HKDF with SHA-256, the label as `info` and 32 bytes of output; agree() takes
// the transcript as it is given (32 bytes in chapter 5, 64 in chapter 8), and does not hash it.
//
// What the tools do not protect against: being put together badly. Each is sound, and a protocol
// made of sound tools can be replayed, turned around, or talked into an old key. Chapters 5 and 8
// say what they do about that. Nor against a computer that breaks RSA and X25519, for which none of
// them was made.

// Throws Error with OpenSSL's own reason unless `ok`. The queue of reasons is left empty.
inline void require_openssl(bool ok, std::string_view what) {
    if (ok) return;
    unsigned long code = ::ERR_get_error();
    const char* reason = code != 0 ? ::ERR_reason_error_string(code) : nullptr;
    ::ERR_clear_error();
    throw Error(concat(what, " failed", reason != nullptr ? ": " : "",
                       reason != nullptr ? reason : "", "."));
}

namespace detail {

template <auto Free>
struct Freed {  // how a unique_ptr gives an OpenSSL object back
    template <class T>
    void operator()(T* object) const noexcept {
        Free(object);
    }
};
using PkeyPtr = std::unique_ptr<EVP_PKEY, Freed<EVP_PKEY_free>>;
using PkeyContext = std::unique_ptr<EVP_PKEY_CTX, Freed<EVP_PKEY_CTX_free>>;
using DigestContext = std::unique_ptr<EVP_MD_CTX, Freed<EVP_MD_CTX_free>>;
using CipherContext = std::unique_ptr<EVP_CIPHER_CTX, Freed<EVP_CIPHER_CTX_free>>;
using BioPtr = std::unique_ptr<BIO, Freed<BIO_free_all>>;
using Pkcs8Ptr = std::unique_ptr<PKCS8_PRIV_KEY_INFO, Freed<PKCS8_PRIV_KEY_INFO_free>>;
using X509SigPtr = std::unique_ptr<X509_SIG, Freed<X509_SIG_free>>;
using BignumPtr = std::unique_ptr<BIGNUM, Freed<BN_free>>;

// OpenSSL's parameters are lists of (name, pointer). They only read what these two point to, but
// their type is not const.
inline OSSL_PARAM text_param(const char* name, const char* value) {
    return ::OSSL_PARAM_construct_utf8_string(name, const_cast<char*>(value), 0);
}
inline OSSL_PARAM bytes_param(const char* name, ByteView value) {
    static constexpr std::uint8_t nothing = 0;  // a null pointer would be an error
    const std::uint8_t* data = value.empty() ? &nothing : value.data();
    return ::OSSL_PARAM_construct_octet_string(name, const_cast<std::uint8_t*>(data), value.size());
}

}  // namespace detail

// ---- Randomness and hashes ----------------------------------------------------------------------

// Unpredictable bytes from the system's generator, seeded and reseeded by OpenSSL.
inline void fill_random(ByteSpan bytes) {
    require_openssl(::RAND_priv_bytes(bytes.data(), static_cast<int>(bytes.size())) == 1,
                    "Drawing random bytes");
}
template <std::size_t N>
Secret<N> random_secret() {
    Secret<N> secret;
    fill_random(secret.span());
    return secret;
}
inline Bytes random_bytes(std::size_t size) {
    Bytes bytes(size);
    fill_random(bytes);
    return bytes;
}

// SHA-256 (FIPS 180-4) of what comes piece by piece.
class Sha256 {
  public:
    Sha256() : context_(::EVP_MD_CTX_new()) {
        require_openssl(::EVP_DigestInit_ex2(context_.get(), ::EVP_sha256(), nullptr) == 1,
                        "SHA-256");
    }
    void update(ByteView bytes) {
        require_openssl(::EVP_DigestUpdate(context_.get(), bytes.data(), bytes.size()) == 1,
                        "SHA-256");
    }
    Digest finish() {  // once, at the end
        Digest digest{};
        require_openssl(::EVP_DigestFinal_ex(context_.get(), digest.data(), nullptr) == 1,
                        "SHA-256");
        return digest;
    }

  private:
    detail::DigestContext context_;
};

template <class... Part>
Digest sha256(const Part&... part) {  // of all parts, one after the other
    Sha256 hash;
    (hash.update(ByteView(part)), ...);
    return hash.finish();
}

// HMAC-SHA256 (RFC 2104).
inline Secret<32> hmac_sha256(ByteView key, ByteView message) {
    Secret<32> mac;
    require_openssl(::HMAC(::EVP_sha256(), key.data(), static_cast<int>(key.size()), message.data(),
                           message.size(), mac.span().data(), nullptr) != nullptr,
                    "HMAC");
    return mac;
}

// ---- HKDF: one secret becomes many keys (RFC 5869) ----------------------------------------------

namespace detail {
inline void tell_secret(const Tracer& trace, std::string_view name, const Secret<32>& secret,
                        ByteView made_from = {}) {
    if (trace)
        trace({TraceEvent::Layer::secret, TraceEvent::Way::none, made_from, secret.view(), name});
}
}  // namespace detail

// Concentrates the entropy of `ikm` into a pseudorandom key. The salt need not be secret; here it
// is the hash of everything that was said, so that whoever changed a byte gets another key.
inline Secret<32> hkdf_extract(ByteView salt, ByteView ikm) { return hmac_sha256(salt, ikm); }
// Derives a key for one purpose, named by `label`. Keys with different labels tell nothing about
// each other.
inline Secret<32> hkdf_expand(const Secret<32>& prk, std::string_view label,
                              const Tracer& trace = {}) {
    constexpr std::array<std::uint8_t, 1> first_block{1};  // 32 bytes are one block: the only one
    Secret<32> key = hmac_sha256(prk.view(), join(as_bytes(label), first_block));
    detail::tell_secret(trace, label, key);
    return key;
}

// The construction of the chapter's introduction.
inline Secret<32> agree(ByteView transcript, const Secret<32>& oaep_secret,
                        const Secret<32>& ephemeral, const Tracer& trace = {}) {
    Secret<64> ikm;
    std::copy(oaep_secret.view().begin(), oaep_secret.view().end(), ikm.span().begin());
    std::copy(ephemeral.view().begin(), ephemeral.view().end(), ikm.span().begin() + 32);
    Secret<32> prk = hkdf_extract(transcript, ikm.view());
    detail::tell_secret(trace, "OAEP secret", oaep_secret);
    detail::tell_secret(trace, "X25519 secret", ephemeral);
    detail::tell_secret(trace, "prk", prk, transcript);
    return prk;
}

// PBKDF2-HMAC-SHA256 (RFC 8018): a slow hash for passwords. Blocks: about 0.25 s for 600,000
// iterations. That is its purpose: an attacker who tries a billion passwords pays for each.
inline Secret<32> pbkdf2_sha256(ByteView password, ByteView salt, std::uint32_t iterations) {
    Secret<32> out;
    require_openssl(::PKCS5_PBKDF2_HMAC(as_text(password).data(), static_cast<int>(password.size()),
                                        salt.data(), static_cast<int>(salt.size()),
                                        static_cast<int>(iterations), ::EVP_sha256(), 32,
                                        out.span().data()) == 1,
                    "PBKDF2");
    return out;
}

// ---- Fingerprints -------------------------------------------------------------------------------

// The SHA-256 of a public key's SPKI (its standard encoding, RFC 5280 section 4.1.2.7). Short
// enough to compare, printed like OpenSSH does: "SHA256:" and base64 without padding. To compute
// it with other tools:
//      openssl pkey -pubin -in server_public.pem -outform DER |
//          openssl dgst -sha256 -binary | base64
struct Fingerprint {
    Digest digest{};

    std::string text() const {
        std::string base64 = to_base64(digest);
        return concat("SHA256:", base64.substr(0, base64.find('=')));
    }
    // Throws Error.
    static Fingerprint parse(std::string_view text) {
        constexpr std::string_view prefix = "SHA256:";
        Bytes bytes;
        if (text.starts_with(prefix) && text.size() == prefix.size() + 43 && !text.ends_with('='))
            bytes = from_base64(concat(text.substr(prefix.size()), "="));
        if (bytes.size() != 32)
            throw Error(concat("\"", visible(text.substr(0, 80)),
                               "\" is no fingerprint: that is SHA256: and 43 characters, as the "
                               "server prints it."));
        return {to_fixed<32>(bytes)};
    }
    friend bool operator==(const Fingerprint&, const Fingerprint&) = default;
};

// ---- RSA ----------------------------------------------------------------------------------------

inline constexpr int min_rsa_bits = 2048;  // below: broken or close to it (NIST SP 800-57)
inline constexpr int max_rsa_bits = 4096;  // above: a stranger's key could cost us real time
inline constexpr int default_rsa_bits = 3072;
inline constexpr std::size_t max_rsa_bytes = max_rsa_bits / 8;
inline constexpr std::size_t max_key_file_bytes = 64 * 1024;

namespace detail {

// A key that we are willing to compute with. A public exponent is usually 65537; the bound keeps
// a stranger from choosing one that makes the "cheap" public operation expensive (and FIPS 186-5
// asks for more than 2^16).
template <class Failure>
void require_usable_rsa(const PkeyPtr& key, std::string_view what) {
    if (key == nullptr || ::EVP_PKEY_is_a(key.get(), "RSA") != 1) {
        ::ERR_clear_error();
        throw Failure(concat(what, " holds no RSA key."));
    }
    int bits = ::EVP_PKEY_get_bits(key.get());
    if (bits < min_rsa_bits || bits > max_rsa_bits)
        throw Failure(concat(what, " holds an RSA key of ", bits, " bits; ", min_rsa_bits, " to ",
                             max_rsa_bits, " are accepted."));
    auto number = [&](const char* name) {
        BIGNUM* raw = nullptr;
        ::EVP_PKEY_get_bn_param(key.get(), name, &raw);
        return BignumPtr(raw);
    };
    BignumPtr modulus = number(OSSL_PKEY_PARAM_RSA_N), exponent = number(OSSL_PKEY_PARAM_RSA_E);
    if (modulus == nullptr || ::BN_is_odd(modulus.get()) != 1)
        throw Failure(concat(what, " holds an RSA key with an impossible modulus."));
    if (exponent == nullptr || ::BN_is_odd(exponent.get()) != 1 ||
        ::BN_num_bits(exponent.get()) < 17 || ::BN_num_bits(exponent.get()) > 32)
        throw Failure(concat(what, " holds an RSA key with an unusual public exponent."));
}

// OAEP with SHA-256 (RFC 8017 section 7.1). The label is authenticated with the secret: what was
// encapsulated for one handshake does not open in another.
inline std::array<OSSL_PARAM, 5> oaep_params(ByteView label) {
    return {text_param(OSSL_ASYM_CIPHER_PARAM_PAD_MODE, OSSL_PKEY_RSA_PAD_MODE_OAEP),
            text_param(OSSL_ASYM_CIPHER_PARAM_OAEP_DIGEST, "SHA256"),
            text_param(OSSL_ASYM_CIPHER_PARAM_MGF1_DIGEST, "SHA256"),
            bytes_param(OSSL_ASYM_CIPHER_PARAM_OAEP_LABEL, label), ::OSSL_PARAM_construct_end()};
}
// PSS with SHA-256 and a salt of 32 bytes (RFC 8017 section 8.1).
inline std::array<OSSL_PARAM, 4> pss_params() {
    return {text_param(OSSL_SIGNATURE_PARAM_PAD_MODE, OSSL_PKEY_RSA_PAD_MODE_PSS),
            text_param(OSSL_SIGNATURE_PARAM_PSS_SALTLEN, OSSL_PKEY_RSA_PSS_SALT_LEN_DIGEST),
            text_param(OSSL_SIGNATURE_PARAM_MGF1_DIGEST, "SHA256"), ::OSSL_PARAM_construct_end()};
}

inline BioPtr memory_bio(ByteView content) {
    return BioPtr(::BIO_new_mem_buf(content.data(), static_cast<int>(content.size())));
}
// What `write` writes into a BIO, which may be secret. `write` returns 1, as OpenSSL's writers do.
template <class Write>
SecretBytes written(const Write& write) {
    BioPtr bio(::BIO_new(::BIO_s_secmem()));
    require_openssl(write(bio.get()) == 1, "Encoding a key");
    char* data = nullptr;
    long size = ::BIO_get_mem_data(bio.get(), &data);
    return SecretBytes(data, data + size);
}

}  // namespace detail

class RsaPublicKey {
  public:
    // From SPKI, DER, as it comes from others. Throws ProtocolError if it is no RSA key that we
    // accept, or not written in the one way that DER knows: OpenSSL also reads others, and a key
    // in two spellings would be two keys to whoever compares bytes.
    static RsaPublicKey from_der(ByteView der, std::string_view what = "A public key") {
        const unsigned char* cursor = der.data();
        detail::PkeyPtr key(::d2i_PUBKEY(nullptr, &cursor, static_cast<long>(der.size())));
        detail::require_usable_rsa<ProtocolError>(key, what);
        RsaPublicKey result(std::move(key));
        if (!std::equal(der.begin(), der.end(), result.der_.begin(), result.der_.end()))
            throw ProtocolError(concat(what, " is not written as DER, or has bytes behind it."));
        return result;
    }
    // From a file's content. Throws Error.
    static RsaPublicKey from_pem(ByteView pem, std::string_view what) {
        detail::BioPtr bio = detail::memory_bio(pem);
        detail::PkeyPtr key(::PEM_read_bio_PUBKEY(bio.get(), nullptr, nullptr, nullptr));
        detail::require_usable_rsa<Error>(key, what);
        return RsaPublicKey(std::move(key));
    }
    explicit RsaPublicKey(detail::PkeyPtr key) : key_(std::move(key)) {
        unsigned char* out = nullptr;
        int size = ::i2d_PUBKEY(key_.get(), &out);
        require_openssl(size > 0, "Encoding a public key");
        der_.assign(out, out + size);
        ::OPENSSL_free(out);
    }

    const Bytes& der() const { return der_; }
    Fingerprint fingerprint() const { return {sha256(der_)}; }
    std::size_t modulus_bytes() const {
        return static_cast<std::size_t>(::EVP_PKEY_get_size(key_.get()));
    }

    std::string pem() const {
        return to_string(
            detail::written([&](BIO* bio) { return ::PEM_write_bio_PUBKEY(bio, key_.get()); }));
    }

    // RSA-OAEP: the secret, encapsulated so that only the private key opens it; modulus_bytes()
    // long.
    Bytes encrypt(const Secret<32>& secret, ByteView label) const {
        auto params = detail::oaep_params(label);
        detail::PkeyContext context(::EVP_PKEY_CTX_new(key_.get(), nullptr));
        Bytes encapsulated(modulus_bytes());
        std::size_t size = encapsulated.size();
        require_openssl(::EVP_PKEY_encrypt_init_ex(context.get(), params.data()) == 1 &&
                            ::EVP_PKEY_encrypt(context.get(), encapsulated.data(), &size,
                                               secret.view().data(), 32) == 1,
                        "RSA encryption");
        return encapsulated;
    }

    // RSA-PSS: true if `signature` was made over `message` by the private key.
    bool verify(ByteView message, ByteView signature) const {
        auto params = detail::pss_params();
        detail::DigestContext context(::EVP_MD_CTX_new());
        bool good = ::EVP_DigestVerifyInit_ex(context.get(), nullptr, "SHA256", nullptr, nullptr,
                                              key_.get(), params.data()) == 1 &&
                    ::EVP_DigestVerify(context.get(), signature.data(), signature.size(),
                                       message.data(), message.size()) == 1;
        ::ERR_clear_error();
        return good;
    }

  private:
    detail::PkeyPtr key_;
    Bytes der_;
};

class RsaPrivateKey {
  public:
    // Blocks: finding two primes takes from 0.1 to some seconds for 3072 bits.
    static RsaPrivateKey generate(int bits) {
        detail::PkeyPtr key(::EVP_RSA_gen(static_cast<unsigned>(bits)));
        require_openssl(key != nullptr, "Making an RSA key");
        return RsaPrivateKey(std::move(key));
    }

    // Reads a PEM file: PKCS#8, encrypted with `passphrase` unless that is empty. Nothing if there
    // is no such file; throws Error if it does not open.
    static std::optional<RsaPrivateKey> load(const std::filesystem::path& path,
                                             ByteView passphrase) {
        std::optional<SecretBytes> pem = read_file(path, max_key_file_bytes);
        if (!pem) return std::nullopt;
        detail::BioPtr bio = detail::memory_bio(*pem);
        detail::PkeyPtr key(
            ::PEM_read_bio_PrivateKey(bio.get(), nullptr, &give_passphrase, &passphrase));
        ::ERR_clear_error();
        if (key == nullptr)
            throw Error(concat(path.string(), " is no private key that opens",
                               passphrase.empty() ? "." : " with this password."));
        detail::require_usable_rsa<Error>(key, path.string());
        return RsaPrivateKey(std::move(key));
    }

    // Writes the same, mode 0600. The passphrase goes through PBKDF2 with `iterations` and
    // encrypts with AES-256-CBC, the most that `openssl pkey` of every age can read (PBES2, RFC
    // 8018). OpenSSL's default of 2,048 iterations is from another time.
    void save(const std::filesystem::path& path, ByteView passphrase,
              std::uint32_t iterations) const {
        detail::Pkcs8Ptr plain = pkcs8();
        detail::X509SigPtr sealed;
        if (!passphrase.empty())
            sealed.reset(::PKCS8_encrypt(-1, ::EVP_aes_256_cbc(), as_text(passphrase).data(),
                                         static_cast<int>(passphrase.size()), nullptr, 0,
                                         static_cast<int>(iterations), plain.get()));
        require_openssl(sealed != nullptr || passphrase.empty(), "Encrypting a private key");
        SecretBytes pem = detail::written([&](BIO* bio) {
            return sealed != nullptr ? ::PEM_write_bio_PKCS8(bio, sealed.get())
                                     : ::PEM_write_bio_PKCS8_PRIV_KEY_INFO(bio, plain.get());
        });
        write_file(path, pem, FileMode::owner_only);
    }

    const RsaPublicKey& public_key() const { return public_; }

    // Opens an encapsulated secret of 32 bytes (RSA-OAEP); nothing if it does not open.
    //
    // Careful with "nothing": whoever can ask us many times whether something opens can, with a
    // padding oracle, open a secret that was not meant for them (Manger's attack on OAEP, 2001).
    // Where strangers can ask, use decrypt_or_random.
    std::optional<Secret<32>> decrypt(ByteView encapsulated, ByteView label) const {
        auto params = detail::oaep_params(label);
        detail::PkeyContext context(::EVP_PKEY_CTX_new(key_.get(), nullptr));
        Secret<max_rsa_bytes> opened;  // OpenSSL wants room for a whole block
        std::size_t size = max_rsa_bytes;
        bool ok = ::EVP_PKEY_decrypt_init_ex(context.get(), params.data()) == 1 &&
                  ::EVP_PKEY_decrypt(context.get(), opened.span().data(), &size,
                                     encapsulated.data(), encapsulated.size()) == 1 &&
                  size == 32;
        ::ERR_clear_error();
        if (!ok) return std::nullopt;
        return Secret<32>(opened.view().first(32));
    }
    // The same, and a random secret when it does not open ("implicit rejection"): the
    // conversation goes on and fails later, in the same way and at the same place for every cause.
    Secret<32> decrypt_or_random(ByteView encapsulated, ByteView label) const {
        Secret<32> random = random_secret<32>();
        std::optional<Secret<32>> secret = decrypt(encapsulated, label);
        return std::move(secret ? *secret : random);
    }

    // RSA-PSS over the SHA-256 of `message`.
    Bytes sign(ByteView message) const {
        auto params = detail::pss_params();
        detail::DigestContext context(::EVP_MD_CTX_new());
        Bytes signature(public_.modulus_bytes());
        std::size_t size = signature.size();
        require_openssl(::EVP_DigestSignInit_ex(context.get(), nullptr, "SHA256", nullptr, nullptr,
                                                key_.get(), params.data()) == 1 &&
                            ::EVP_DigestSign(context.get(), signature.data(), &size, message.data(),
                                             message.size()) == 1,
                        "RSA signing");
        return signature;
    }

    // A secret that only the holder of this key knows, for one purpose.
    Secret<32> derived_secret(std::string_view label) const {
        detail::Pkcs8Ptr plain = pkcs8();
        SecretBytes der = detail::written(
            [&](BIO* bio) { return ::i2d_PKCS8_PRIV_KEY_INFO_bio(bio, plain.get()); });
        return hkdf_expand(hkdf_extract({}, der), label);
    }

  private:
    explicit RsaPrivateKey(detail::PkeyPtr key)
        : key_(std::move(key)), public_(RsaPublicKey(detail::PkeyPtr(share(key_.get())))) {}

    detail::Pkcs8Ptr pkcs8() const {  // unencrypted
        detail::Pkcs8Ptr plain(::EVP_PKEY2PKCS8(key_.get()));
        require_openssl(plain != nullptr, "Encoding a private key");
        return plain;
    }
    static EVP_PKEY* share(EVP_PKEY* key) {  // OpenSSL counts references itself
        ::EVP_PKEY_up_ref(key);
        return key;
    }
    static int give_passphrase(char* buffer, int size, int, void* passphrase) {
        ByteView bytes = *static_cast<const ByteView*>(passphrase);
        if (bytes.size() > static_cast<std::size_t>(size)) return -1;
        std::copy(bytes.begin(), bytes.end(), buffer);
        return static_cast<int>(bytes.size());
    }
    detail::PkeyPtr key_;
    RsaPublicKey public_;
};

// ---- X25519 (RFC 7748) --------------------------------------------------------------------------

using X25519Public = std::array<std::uint8_t, 32>;

// One side of an ephemeral exchange. The private half leaves this object only for a trace.
class X25519Key {
  public:
    static X25519Key generate() {
        return X25519Key(detail::PkeyPtr(::EVP_PKEY_Q_keygen(nullptr, nullptr, "X25519")));
    }
    static X25519Key from_private(const Secret<32>& scalar) {
        return X25519Key(detail::PkeyPtr(
            ::EVP_PKEY_new_raw_private_key(EVP_PKEY_X25519, nullptr, scalar.view().data(), 32)));
    }

    const X25519Public& public_key() const { return public_; }
    void tell_private(const Tracer& trace, std::string_view name) const {
        if (!trace) return;
        Secret<32> scalar;
        std::size_t size = 32;
        if (::EVP_PKEY_get_raw_private_key(key_.get(), scalar.span().data(), &size) == 1)
            detail::tell_secret(trace, name, scalar, public_);
    }

    // The secret that both sides get from the other's public key. Throws ProtocolError for the few
    // public keys that would make it zero, whoever's turn it is (RFC 7748 section 6.1).
    Secret<32> shared_secret(const X25519Public& other) const {
        detail::PkeyPtr peer(
            ::EVP_PKEY_new_raw_public_key(EVP_PKEY_X25519, nullptr, other.data(), other.size()));
        detail::PkeyContext context(::EVP_PKEY_CTX_new(key_.get(), nullptr));
        Secret<32> secret;
        std::size_t size = 32;
        bool ok = peer != nullptr && ::EVP_PKEY_derive_init(context.get()) == 1 &&
                  ::EVP_PKEY_derive_set_peer(context.get(), peer.get()) == 1 &&
                  ::EVP_PKEY_derive(context.get(), secret.span().data(), &size) == 1;
        ::ERR_clear_error();
        if (!ok) throw ProtocolError("Received an X25519 key that cannot be used.");
        return secret;
    }

  private:
    explicit X25519Key(detail::PkeyPtr key) : key_(std::move(key)) {
        std::size_t size = public_.size();
        require_openssl(key_ != nullptr &&
                            ::EVP_PKEY_get_raw_public_key(key_.get(), public_.data(), &size) == 1,
                        "Making an X25519 key");
    }
    detail::PkeyPtr key_;
    X25519Public public_{};
};

// ---- AES-256-GCM (NIST SP 800-38D) --------------------------------------------------------------

inline constexpr std::size_t gcm_tag_bytes = 16;

// 96 bits that must never be used twice with one key. Ours are counters: 0 (u32) || number (u64).
class Nonce {
  public:
    explicit Nonce(std::uint64_t number) {
        for (std::size_t i = 0; i < 8; ++i)
            bytes_[11 - i] = static_cast<std::uint8_t>(number >> (8 * i));
    }
    const std::uint8_t* data() const { return bytes_.data(); }

  private:
    std::array<std::uint8_t, 12> bytes_{};
};

// The cipher with one key, for one direction. It keeps one OpenSSL context for all messages:
// setting up the key schedule is the expensive part, a new nonce is cheap.
class AesGcm {
  public:
    explicit AesGcm(const Secret<32>& key) : context_(::EVP_CIPHER_CTX_new()) {
        require_openssl(::EVP_EncryptInit_ex2(context_.get(), ::EVP_aes_256_gcm(),
                                              key.view().data(), nullptr, nullptr) == 1,
                        "AES-256-GCM");
    }
    // Encrypts `text` in place and writes the tag. `aad` is authenticated and not encrypted.
    void seal(const Nonce& nonce, ByteView aad, ByteSpan text, std::span<std::uint8_t, 16> tag) {
        require_openssl(
            run(1, nonce, aad, text) &&
                ::EVP_CIPHER_CTX_ctrl(context_.get(), EVP_CTRL_AEAD_GET_TAG, 16, tag.data()) == 1,
            "AES-256-GCM");
    }
    // Decrypts `sealed` (ciphertext and tag) in place and returns the plaintext inside it; nothing
    // if it was not sealed with this key, nonce and aad. What is in `sealed` is then garbage.
    [[nodiscard]] std::optional<ByteSpan> open(const Nonce& nonce, ByteView aad, ByteSpan sealed) {
        if (sealed.size() < gcm_tag_bytes) return std::nullopt;
        ByteSpan text = sealed.first(sealed.size() - gcm_tag_bytes);
        if (run(0, nonce, aad, text, sealed.data() + text.size())) return text;
        ::ERR_clear_error();
        return std::nullopt;
    }

  private:
    // Encrypts (1) or decrypts (0) in place; then a wrong `tag` makes it fail.
    bool run(int encrypt, const Nonce& nonce, ByteView aad, ByteSpan text,
             std::uint8_t* tag = nullptr) {
        EVP_CIPHER_CTX* c = context_.get();
        int size = 0;
        auto update = [&](std::uint8_t* out, ByteView in) {
            return in.empty() ||
                   ::EVP_CipherUpdate(c, out, &size, in.data(), static_cast<int>(in.size())) == 1;
        };
        return ::EVP_CipherInit_ex2(c, nullptr, nullptr, nonce.data(), encrypt, nullptr) == 1 &&
               update(nullptr, aad) && update(text.data(), text) &&
               (tag == nullptr || ::EVP_CIPHER_CTX_ctrl(c, EVP_CTRL_AEAD_SET_TAG, 16, tag) == 1) &&
               ::EVP_CipherFinal_ex(c, nullptr, &size) == 1;
    }
    detail::CipherContext context_;
};

// ---- Try it -------------------------------------------------------------------------------------
//
// Break: oracle (whether a secret opens can be asked, as often as one likes) and any-label (a
// secret that was encapsulated for one purpose opens for another).
//
// Write a BOX: bytes of any length, for the holder of one RSA key alone. RSA-OAEP is too small for
// them, AES-256-GCM has no public key; together they do it. Nothing comes back for a box that was
// changed, cut, or meant for another key, and nothing is thrown. Two boxes with the same content
// have nothing in common, so that nobody can try what is in one.
//
//      Bytes make_box(const RsaPublicKey& to, ByteView content)
//      std::optional<Bytes> open_box(const RsaPrivateKey& mine, ByteView box)
//
// Green: exercise: box

// =================================================================================================
//  Chapter 5. The hop channel
// =================================================================================================
//
// Between a client and the server lies a network that reads along, changes bytes, replays
// yesterday's conversation, or pretends to be the server. The hop channel deals with all of them.
// It opens with a handshake of three frames in the clear, each at most 2 KiB:
//
//      1. C -> S   "CHATSEC1" || x25519_c                                   ClientHello
//      2. S -> C   "CHATSEC1" || x25519_s || server's RSA key (SPKI, DER)   ServerHello
//
//         Here the client stops and looks: is this the key that it knows ("pinned")? A key that
//         changed is refused before anything else is sent.
//
//      3. C -> S   RSA-OAEP(server key, secret[32], label = SHA-256(1 || 2))  ClientKey
//
//         both     th  = SHA-256(1 || 2 || 3)
//                  prk = agree(th, secret, X25519)          (chapter 4)
//                  key client -> server = HKDF-Expand(prk, "chatsecure hop client to server")
//                  key server -> client = HKDF-Expand(prk, "chatsecure hop server to client")
//                  channel binding      = HKDF-Expand(prk, "chatsecure hop channel binding")
//
//      4. S -> C   the first sealed record: Welcome
//
// (1, 2 and 3 in these formulas are the contents of the frames, without their lengths.)
//
// What each side checks, and ends the connection if it is not so:
//
//   1. The server: 40 bytes, of which the first eight are right. Another version has another digit.
//   2. The client: the same beginning; behind it an RSA key that chapter 4 accepts, and nothing
//      else. Then the pin.
//   3. The server: nothing of what is encapsulated (see below). But both end the connection for the
//      few X25519 keys with which there is no secret.
//   4. The client: a record that opens, and begins with Welcome.
//
// A server gives the handshake 10 s, and the login that follows 60 s.
//
// Why each piece is there:
//   - Only the holder of the RSA key can open 3, so a first record that opens (4) proves that the
//     server is the one whose key it showed. The client sends nothing before that.
//   - x25519_c and x25519_s are new for each connection and forgotten at its end, so an RSA key
//     that is stolen next year does not open this year's recordings (P1).
//   - The label ties the encapsulated secret to these two hellos: put into another handshake, it
//     does not open. The transcript hash ties the keys to all three frames: a man in the middle who
//     changes one bit leaves the two sides with different keys (P2).
//   - A secret that does not open is not reported: the server goes on with a random one, and the
//     next record fails instead. Whoever probes the server with bad ones learns nothing.
//   - The channel binding is a value that only the two ends of this channel share. Chapter 6 mixes
//     it into the login, so a man in the middle cannot pass a login on from his channel to another.
//
// After the handshake everything travels in records:
//
//      +-----------------------+------------------------------------------------------+
//      | u32 length            | AES-256-GCM( key of this direction,                  |
//      | (ciphertext and tag)  |     nonce = 0 (u32) || number of the record (u64),   |
//      |                       |     aad = the 4 bytes of the length,                 |
//      |                       |     plaintext = whole messages, at most 64 KiB )     |
//      +-----------------------+------------------------------------------------------+
//
// The number is not sent: both sides count, each direction for itself, and the first record is
// number 0. A record holds one message at least; an empty one ends the connection, for whoever
// sends nothing for ever would be served for ever. A message never reaches from one record into the
// next.
//
// A REPLAY is a genuine message, recorded and sent again. Under the same key and number it would
// open, because it is right: only a number that counts, or a key that is new, shows that it is not
// the one that is due.
//
// A record that was changed, repeated, left out, moved or sent back to its author meets the wrong
// number or the wrong key and does not open, and that ends the connection: after such an event
// nobody knows what else is wrong (P3). A connection that is cut at a record's edge looks like a
// normal end to TCP; therefore a clean end is said in words (Goodbye, chapter 7). One record holds
// as many messages as are waiting, so that a busy connection pays for encryption and for a system
// call once for many.
//
// AES-GCM with one key has a limit; NIST's is 2^32 records with random nonces, and more with
// counters. Far below it, every 2^20 records, each direction moves to a new key,
//      key = HKDF-Expand(key, "chatsecure hop next key")
// and forgets the old one: record 2^20 is the first under the second key. The numbers go on
// counting.
//
// What the channel does not hide: that two machines talk, when, and how much.

inline constexpr std::string_view protocol_magic = "CHATSEC1";  // its last digit is the version
inline constexpr std::size_t max_handshake_bytes = 2048;
inline constexpr std::size_t max_record_bytes = 64 * 1024;  // of plaintext
inline constexpr std::size_t max_record_frame = max_record_bytes + gcm_tag_bytes;
inline constexpr std::uint64_t records_per_key = 1ULL << 20;

struct HopKeys {
    Secret<32> client_to_server;
    Secret<32> server_to_client;
    Digest channel_binding{};
};

namespace detail {

inline HopKeys derive_hop_keys(ByteView hello1, ByteView hello2, ByteView key3,
                               const Secret<32>& secret, const Secret<32>& x25519,
                               const Tracer& trace = {}) {
    Secret<32> prk = agree(sha256(hello1, hello2, key3), secret, x25519, trace);
    return {hkdf_expand(prk, "chatsecure hop client to server", trace),
            hkdf_expand(prk, "chatsecure hop server to client", trace),
            to_fixed<32>(hkdf_expand(prk, "chatsecure hop channel binding", trace).view())};
}

// The beginning of both hellos. Throws ProtocolError.
inline X25519Public read_hello(Reader& reader) {
    if (as_text(reader.raw(protocol_magic.size())) != protocol_magic)
        throw ProtocolError("The other side does not speak this version of ChatSecure.");
    X25519Public key{};
    reader(key);
    return key;
}

}  // namespace detail

// The client's half. It computes and does no I/O: the caller carries the frames.
class ClientHandshake {
  public:
    // Frame 1.
    ByteView hello() const { return hello1_; }

    // Takes frame 2 and returns the server's key, for the caller to compare with its pin BEFORE it
    // calls key_message(). Throws ProtocolError.
    const RsaPublicKey& receive_hello(ByteView frame2) {
        Reader reader(frame2, "a server hello");
        server_x25519_ = detail::read_hello(reader);
        server_key_ = RsaPublicKey::from_der(reader.rest(), "The server's hello");
        hello2_ = to_bytes(frame2);
        return *server_key_;
    }

    // Makes frame 3 and the keys.
    Bytes key_message(HopKeys& keys, const Tracer& trace = {}) {
        ephemeral_.tell_private(trace, "x25519_c");
        Secret<32> secret = random_secret<32>();
        Bytes key3 = server_key_->encrypt(secret, sha256(hello1_, hello2_));
        keys = detail::derive_hop_keys(hello1_, hello2_, key3, secret,
                                       ephemeral_.shared_secret(server_x25519_), trace);
        return key3;
    }

  private:
    X25519Key ephemeral_ = X25519Key::generate();
    Bytes hello1_ = join(as_bytes(protocol_magic), ephemeral_.public_key());
    Bytes hello2_;
    X25519Public server_x25519_{};
    std::optional<RsaPublicKey> server_key_;
};

// The server's half.
class ServerHandshake {
  public:
    // Takes frame 1. Throws ProtocolError.
    ServerHandshake(const RsaPrivateKey& key, ByteView frame1)
        : key_(key), hello1_(to_bytes(frame1)) {
        Reader reader(frame1, "a client hello");
        client_x25519_ = detail::read_hello(reader);
        reader.finish();
    }

    // Frame 2.
    ByteView hello() const { return hello2_; }

    // Takes frame 3 and makes the keys, wrong ones if it does not open. One RSA operation.
    HopKeys receive_key(ByteView frame3, const Tracer& trace = {}) const {
        ephemeral_.tell_private(trace, "x25519_s");
        Secret<32> secret = key_.decrypt_or_random(frame3, sha256(hello1_, hello2_));
        return detail::derive_hop_keys(hello1_, hello2_, frame3, secret,
                                       ephemeral_.shared_secret(client_x25519_), trace);
    }

  private:
    const RsaPrivateKey& key_;
    X25519Key ephemeral_ = X25519Key::generate();
    Bytes hello1_;
    Bytes hello2_ =
        join(as_bytes(protocol_magic), ephemeral_.public_key(), key_.public_key().der());
    X25519Public client_x25519_{};
};

// The records of one direction: one side seals them, the other opens them.
class RecordCipher {
  public:
    explicit RecordCipher(Secret<32> key) : key_(std::move(key)), cipher_(key_) {}

    // `record` holds room for the header (4 bytes), then the plaintext. Afterwards it is the whole
    // frame, ready to send. In place, because copying would be the largest cost of a record.
    void seal(Bytes& record) {
        std::size_t plain = record.size() - frame_header_bytes;
        if (plain > max_record_bytes) throw Error("A record holds at most 64 KiB.");
        record.resize(record.size() + gcm_tag_bytes);
        auto header = frame_header(plain + gcm_tag_bytes);
        std::copy(header.begin(), header.end(), record.begin());
        ByteSpan all(record);
        Nonce nonce = next();
        cipher_.seal(nonce, header, all.subspan(frame_header_bytes, plain),
                     all.last<gcm_tag_bytes>());
    }
    // Decrypts a frame's content in place and returns the plaintext. Throws ProtocolError if it is
    // not the record that is due; then the connection must end.
    ByteSpan open(ByteSpan content) {
        Nonce nonce = next();
        std::optional<ByteSpan> plain = cipher_.open(nonce, frame_header(content.size()), content);
        if (!plain)
            throw ProtocolError(
                "Received a record that does not open: it was damaged, repeated or "
                "forged on the way.");
        return *plain;
    }
    std::uint64_t number() const { return number_; }  // of the next record

  private:
    // Of the next record; moves to the next key when it is time.
    Nonce next() {
        if (number_ != 0 && number_ % records_per_key == 0) {
            key_ = hkdf_expand(key_, "chatsecure hop next key");
            cipher_ = AesGcm(key_);
        }
        return Nonce(number_++);
    }

    Secret<32> key_;
    AesGcm cipher_;
    std::uint64_t number_ = 0;
};

// ---- Try it -------------------------------------------------------------------------------------
//
// Break: nonce-not-counted (every record is sealed with the same nonce) and transcript-not-hashed
// (the keys of a channel do not depend on what was said before them).
//
// Write the echo of chapter 2 once more, as a SECURE ECHO: the server's half of the handshake, then
// the content of each record comes back in a record. No Welcome, no messages: nothing of chapters 6
// to 14 is needed. A record that does not open ends it, by an exception that passes through;
// nothing is sent back then. When the other side ends its stream between two records, end ours, and
// return.
//
//      void echo_securely(Socket& socket, const RsaPrivateKey& key)
//
// Green: exercise: secure echo

// =================================================================================================
//  Chapter 6. Passwords
// =================================================================================================
//
// The obvious way to log in, sending the password, gives it to whoever runs the server, and to
// whoever steals its memory. SCRAM-SHA-256 (RFC 5802, RFC 7677) proves on both sides that the
// password is known, and sends it to nobody. The arithmetic:
//
//      SaltedPassword  = PBKDF2(password, salt, iterations)      slow, on the client only
//      ClientKey       = HMAC(SaltedPassword, "Client Key")
//      StoredKey       = SHA-256(ClientKey)                      the server stores this
//      ServerKey       = HMAC(SaltedPassword, "Server Key")      and this
//
//      C -> S   p=chatsecure,,n=alice,r=<client nonce>                           client-first
//      S -> C   r=<both nonces>,s=<salt>,i=<iterations>                          server-first
//      C -> S   c=<channel binding>,r=<both nonces>,p=<ClientProof>              client-final
//      S -> C   v=<ServerSignature>                                              server-final
//
//      AuthMessage     = the first three, glued with commas: client-first without its beginning
//                        "p=chatsecure,,", server-first, client-final without its end ",p=..."
//      ClientProof     = ClientKey XOR HMAC(StoredKey, AuthMessage)
//      ServerSignature = HMAC(ServerKey, AuthMessage)
//
// The channel binding is base64("p=chatsecure,," || the 32 bytes of chapter 5); salt, proof and
// signature are base64 too, and so are the parts of a verifier's text. A nonce is base64 of 18
// random bytes, and in server-first the server's stands directly behind the client's. HMAC's key
// comes first. Step by step:
//
//   1. C sends its name and its nonce. S checks that the name is one (chapter 1) and that the nonce
//      has 16 to 128 characters; otherwise it ends the connection.
//   2. S sends salt (1 to 64 bytes) and iterations. C checks that the nonce begins with its own and
//      goes on, that the iterations are from 4,096 to 10,000,000, and not fewer than it was asked
//      for before; otherwise it ends the connection before it computes anything.
//   3. C sends its proof. S checks the binding, the nonce, and the proof as said below, and that
//      nothing stands behind it. Whatever of these is wrong, it says the same: Goodbye, bad_login.
//      (What does not even begin with c= and r= breaks the protocol.)
//   4. S sends its signature, in LoginDone. C checks it, and believes nothing else before that.
//
// The server undoes the XOR, hashes the ClientKey that it gets, and compares with StoredKey. It
// stores nothing with which one could log in: from StoredKey to ClientKey leads no way back (P7).
// The client checks v: a server that does not know the account cannot make it. "c=" carries the
// channel binding of chapter 5: a man in the middle has two channels with two bindings, and the
// proof for one is none for the other.
//
// An unknown name gets a salt too, computed from a secret of the server, always the same for the
// same name; the login then fails like one with a wrong password. Nobody learns from it which
// accounts exist. (Registering tells which names are taken. It has to.)
//
// The client remembers how many iterations it was asked for. A server that has only begun to be
// hostile, or somebody who has stolen its key, could otherwise ask for 4,096 with a salt of its own
// and get a proof that can be searched a hundred times faster than the account's own entry.
//
// A PIN WAITS FOR PROOF. At first contact the client knows no key of the server. Suppose that it
// pinned the one that is shown, and that a man in the middle shows his. His attack fails: he does
// not hold what belongs to that key, or he does, but the channel binding keeps him from passing the
// login on. He goes away, and his key stays: from now on the client refuses the TRUE server, as
// loudly as it can, and its user learns that such warnings mean nothing. So whatever the client
// keeps of a server is kept after v was right, when the other side has proved both its key (the
// first record of chapter 5) and that it knows the account: its key in known_servers, the
// iterations, and the ticket of chapter 11. Before that it is a claim, and forgotten with the
// connection. Only a key whose fingerprint the user has compared needs no more than its first
// record. (A newcomer who registers has no account that could prove anything: there the
// fingerprint is all that one can compare.)
//
// What it does not protect against: a password that is easy to guess. A stolen users.db can be
// searched offline, at the price of 600,000 hashes for each try. Passwords are used as the bytes of
// their UTF-8; RFC 5802 asks for SASLprep, which changes nothing about ASCII and needs tables that
// would be longer than this header.

inline constexpr std::uint32_t default_iterations = 600'000;  // OWASP's advice for PBKDF2-SHA256
inline constexpr std::uint32_t min_iterations = 4'096;        // RFC 7677 section 4
inline constexpr std::uint32_t max_iterations = 10'000'000;   // more is an attack on the client
inline constexpr std::size_t min_password_characters = 8;
inline constexpr std::size_t max_password_bytes = 1024;

// Throws Error if `password` is none that we let somebody register.
inline void check_new_password(ByteView password) {
    std::optional<std::size_t> length = utf8_length(as_text(password));
    bool control = std::any_of(password.begin(), password.end(),
                               [](std::uint8_t byte) { return byte < 0x20 || byte == 0x7f; });
    if (!length || control) throw Error("A password is text, without control characters.");
    if (*length < min_password_characters)
        throw Error(concat("This password is too short: it has ", *length,
                           *length == 1 ? " character, and " : " characters, and ",
                           min_password_characters,
                           " are the least. A few random words are good."));
    if (password.size() > max_password_bytes)
        throw Error(concat("A password has at most ", max_password_bytes, " bytes."));
}

// ---- The arithmetic -----------------------------------------------------------------------------

// What the server stores: enough to check a login, not enough to make one. Its text is PostgreSQL's
// (the documentation of pg_authid):  SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>
struct ScramVerifier {
    std::uint32_t iterations = 0;
    Bytes salt;
    Digest stored_key{};
    Digest server_key{};

    std::string text() const {
        return concat("SCRAM-SHA-256$", iterations, ":", to_base64(salt), "$",
                      to_base64(stored_key), ":", to_base64(server_key));
    }
    // Throws Error.
    static ScramVerifier parse(std::string_view text) {
        const Error form(
            "The password entry is not of the form "
            "SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey.");
        std::string spaced(text);
        for (char& c : spaced)
            if (c == '$' || c == ':') c = ' ';
        std::vector<std::string> parts = split_words(spaced);
        if (parts.size() != 5 || parts[0] != "SCRAM-SHA-256") throw form;
        ScramVerifier verifier;
        verifier.iterations = parse_number<std::uint32_t>(parts[1]).value_or(0);
        if (verifier.iterations < min_iterations || verifier.iterations > max_iterations)
            throw Error(concat("The password entry's iteration count is not between ",
                               min_iterations, " and ", max_iterations, "."));
        verifier.salt = from_base64(parts[2]);
        Bytes stored = from_base64(parts[3]), server = from_base64(parts[4]);
        if (verifier.salt.size() > 64 || stored.size() != 32 || server.size() != 32)
            throw Error("The password entry has a salt or a key of the wrong size.");
        verifier.stored_key = to_fixed<32>(stored);
        verifier.server_key = to_fixed<32>(server);
        if (verifier.text() != text) throw form;  // one text for each value
        return verifier;
    }
};

namespace detail {

inline void xor_into(ByteSpan target, ByteView other) {
    for (std::size_t i = 0; i < target.size(); ++i) target[i] ^= other[i];
}
// What goes into "c=": which binding we use, and its value (RFC 5802 section 7).
inline std::string binding_text(std::string_view gs2_header, ByteView binding) {
    return to_base64(join(as_bytes(gs2_header), binding));
}
// Takes "x=value" from the front of a SCRAM message, and the comma behind it. Throws ProtocolError.
inline std::string_view take_attribute(std::string_view& message, char name) {
    if (message.size() < 2 || message[0] != name || message[1] != '=')
        throw ProtocolError(concat("Received a login message without its \"", name, "=\"."));
    std::string_view value = message.substr(2, message.find(',') - 2);
    message.remove_prefix(std::min(message.size(), 2 + value.size() + 1));
    return value;
}
inline std::string server_final(ByteView server_key, std::string_view auth_message) {
    return concat("v=", to_base64(hmac_sha256(server_key, as_bytes(auth_message)).view()));
}
inline std::string make_login_nonce() { return to_base64(random_bytes(18)); }

}  // namespace detail

inline ScramVerifier make_verifier(const Secret<32>& salted_password, ByteView salt,
                                   std::uint32_t iterations) {
    Secret<32> client_key = hmac_sha256(salted_password.view(), as_bytes("Client Key"));
    Secret<32> server_key = hmac_sha256(salted_password.view(), as_bytes("Server Key"));
    return {iterations, to_bytes(salt), sha256(client_key.view()), to_fixed<32>(server_key.view())};
}

// ---- The conversation ---------------------------------------------------------------------------

inline constexpr std::string_view scram_gs2_header = "p=chatsecure,,";

// The client's half. The order of the calls is the order of the messages.
class ScramClient {
  public:
    // `binding` is the hop channel's. The header and the nonce are arguments only so that the
    // RFC's own example can be computed.
    ScramClient(std::string_view user, ByteView binding,
                std::string_view gs2_header = scram_gs2_header,
                std::string nonce = detail::make_login_nonce())
        : gs2_header_(gs2_header),
          binding_(detail::binding_text(gs2_header, binding)),
          nonce_(std::move(nonce)),
          first_bare_(concat("n=", user, ",r=", nonce_)) {}

    std::string first() const { return gs2_header_ + first_bare_; }

    // What the server asks for: the caller turns the password into the salted password. Throws
    // ProtocolError for a server that wants fewer iterations than are safe (or absurdly many).
    struct Challenge {
        Bytes salt;
        std::uint32_t iterations = 0;
    };
    Challenge receive_challenge(std::string_view server_first) {
        server_first_ = server_first;
        std::string_view left = server_first;
        both_nonces_ = detail::take_attribute(left, 'r');
        if (!both_nonces_.starts_with(nonce_) || both_nonces_.size() == nonce_.size())
            throw ProtocolError("The server answered another login than ours.");
        std::string_view salt = detail::take_attribute(left, 's');
        auto iterations = parse_number<std::uint32_t>(detail::take_attribute(left, 'i'));
        if (!iterations || salt.empty())
            throw ProtocolError("The server sent a login challenge that makes no sense.");
        if (*iterations < min_iterations || *iterations > max_iterations)
            throw ProtocolError(concat("The server asks for a login with ", *iterations,
                                       " iterations; this client accepts ", min_iterations, " to ",
                                       max_iterations, "."));
        try {
            return {from_base64(salt), *iterations};
        } catch (const Error& e) {
            throw ProtocolError(e.what());
        }
    }

    std::string final(const Secret<32>& salted_password) {
        std::string without_proof = concat("c=", binding_, ",r=", both_nonces_);
        std::string auth_message = concat(first_bare_, ",", server_first_, ",", without_proof);
        Secret<32> proof = hmac_sha256(salted_password.view(), as_bytes("Client Key"));
        Digest stored_key = sha256(proof.view());
        detail::xor_into(proof.span(), hmac_sha256(stored_key, as_bytes(auth_message)).view());
        Secret<32> server_key = hmac_sha256(salted_password.view(), as_bytes("Server Key"));
        expected_final_ = detail::server_final(server_key.view(), auth_message);
        return concat(without_proof, ",p=", to_base64(proof.view()));
    }

    // Throws ProtocolError if the server did not prove that it knows the account.
    void verify_server(std::string_view server_final) const {
        if (!equal_in_constant_time(as_bytes(server_final), as_bytes(expected_final_)))
            throw ProtocolError(
                "The server did not prove that it knows this account. Do not trust it.");
    }

  private:
    std::string gs2_header_, binding_, nonce_, first_bare_, server_first_, both_nonces_,
        expected_final_;
};

// The server's half.
class ScramServer {
  public:
    // Takes client-first. Throws ProtocolError.
    explicit ScramServer(std::string_view client_first, ByteView binding,
                         std::string_view gs2_header = scram_gs2_header,
                         std::string nonce = detail::make_login_nonce())
        : binding_(detail::binding_text(gs2_header, binding)), nonce_(std::move(nonce)) {
        if (!client_first.starts_with(gs2_header))
            throw ProtocolError("Received a login without channel binding.");
        first_bare_ = client_first.substr(gs2_header.size());
        std::string_view left = first_bare_;
        user_ = detail::take_attribute(left, 'n');
        std::string_view client_nonce = detail::take_attribute(left, 'r');
        if (!is_valid_name(user_) || client_nonce.size() < 16 || client_nonce.size() > 128)
            throw ProtocolError("Received a login with an invalid name or nonce.");
        nonce_ = concat(client_nonce, nonce_);
    }

    const std::string& user() const { return user_; }

    // server-first, for the account's verifier (or a made-up one for an unknown name).
    std::string challenge(ScramVerifier verifier) {
        verifier_ = std::move(verifier);
        server_first_ =
            concat("r=", nonce_, ",s=", to_base64(verifier_.salt), ",i=", verifier_.iterations);
        return server_first_;
    }

    // Takes client-final. server-final if the proof is right; nothing if the password (or the
    // channel) is not.
    std::optional<std::string> check(std::string_view client_final) const {
        std::string_view left = client_final;
        std::string_view binding = detail::take_attribute(left, 'c');
        std::string_view nonce = detail::take_attribute(left, 'r');
        std::string_view proof;
        Bytes claimed;
        try {
            proof = detail::take_attribute(left, 'p');
            claimed = from_base64(proof);
        } catch (const Error&) {
            return std::nullopt;
        }
        std::string without_proof = concat("c=", binding, ",r=", nonce);
        if (binding != binding_ || nonce != nonce_ || claimed.size() != 32 ||
            client_final != concat(without_proof, ",p=", proof))  // nothing stands behind it
            return std::nullopt;
        std::string auth_message = concat(first_bare_, ",", server_first_, ",", without_proof);
        Secret<32> client_key(claimed);  // once the XOR is undone
        detail::xor_into(client_key.span(),
                         hmac_sha256(verifier_.stored_key, as_bytes(auth_message)).view());
        if (!equal_in_constant_time(sha256(client_key.view()), verifier_.stored_key))
            return std::nullopt;
        return detail::server_final(verifier_.server_key, auth_message);
    }

  private:
    std::string binding_, nonce_, first_bare_, user_, server_first_;
    ScramVerifier verifier_;
};

// ---- Try it -------------------------------------------------------------------------------------
//
// Break: binding-not-compared (a login can be passed on from one channel to another) and
// any-password (every password is right). Which of the two would a user notice in the first week?
//
// Write what a thief does: you have STOLEN an entry of users.db, and a list of words. Which one is
// the password? Then measure what a word costs with 600,000 iterations, and how long a list of ten
// million takes on your machine.
//
//      std::optional<std::string> guess(const ScramVerifier& stolen,
//                                       const std::vector<std::string>& words)
//
// Green: exercise: stolen

// =================================================================================================
//  Chapter 7. Messages
// =================================================================================================
//
// What client and server say to each other inside the records of chapter 5. Two programs that were
// written by different people must agree on each byte of it, and on what may come when; and a
// newer program must be able to say more, without an older one taking it for something else. So
// each message says what it is and where it ends:
//
//      +---------+-------------+------------------+
//      | u8 type | u32 length  | body             |        several of them fill a record
//      +---------+-------------+------------------+
//
// A whole visit:
//
//      client                                server
//                                            Welcome           the first record: see chapter 5
//      RegisterAccount  (a newcomer)   -->
//                                      <--   Registered
//      Scram            client-first   -->                     chapter 6
//                                      <--   Scram             server-first
//      Scram            client-final   -->
//                                      <--   LoginDone         server-final, and this login's id
//      PublishCard      my public keys -->                     chapter 8
//                                      <--   Joined ... Joined who is here
//                                      <--   Ready
//      GetCard(id)                     -->                     on first need
//                                      <--   CardOf
//      Send(to id, sealed bytes)       -->   Delivered         to that member alone
//      Fanout(text, a key for each)    -->   RoomDelivered     to each member: the text, their key
//                                      <--   Taken             all of them have it in their queues
//                                      <--   Undelivered       "too much waits for that member"
//                                      <--   Joined, Left      as people come and go
//      Ping  <-->  Pong                                        are you still there?
//      Quit                            -->
//                                      <--   Goodbye           everything before it was handled
//
// Who may say what, and what happens otherwise. A message that is not due, is of an unknown type,
// is cut short, or has bytes behind its fields ends the connection (Goodbye: broke_protocol).
//
//   1. Before PublishCard a client says what the picture shows, and nothing else; one
//      RegisterAccount may come first, and the login follows on the same connection. Its verifier
//      is text as PostgreSQL writes it (ScramVerifier), made by the client, with salt and
//      iterations within the limits of chapter 6; otherwise the answer is bad_account. The first
//      Scram carries the ticket of the last LoginDone, or nothing: with it one gets in while others
//      guess at one's password (chapter 11). The second carries none.
//   2. LoginDone tells the client its own number, and of which identity the server has a record:
//      the client tells its user if that is another than its own. The server passes a card on as it
//      is (into one with another identity it looks, to record that); it answers Joined for each of
//      those who are here, and Ready. It never names us to ourselves (a client does not speak to
//      who has its own name), and gives neither 0 nor a number of somebody who is here: then a
//      client ends the connection. From Ready on a client may send what it likes.
//   3. GetCard of somebody who has left has no answer; Left has come, or is on its way.
//   4. Send and Fanout to somebody who has left are thrown away, likewise. Both keep their order on
//      the interactive lane. `tag` is the sender's own, one series for both; 0 is good for whoever
//      does not care.
//   5. A Fanout names its members in ascending order, each once; it may name nobody. Text and keys
//      must fit into a record: a client seals at most 32 KiB (chapter 8), and divides a large room
//      among several Fanouts.
//   6. A Ping is answered with its number, from Ready on. Whoever has heard nothing for some
//      time (the server 30 s, our client 45 s) sends one, and gives up after as long again. If
//      somebody logs in as a user who is here, the server pings that one: who answers stays, and
//      the newcomer is refused (already_online); who does not within 5 s is dropped.
//   7. A client that writes faster than 2,000 messages a second in the long run (20,000 in one go;
//      a text counts for one more with each 256 bytes) is read more slowly. It is told nothing: TCP
//      makes it wait.
//
// "Handled" means: it is in the queues of those it is for. There, Left overtakes what waits on the
// bulk lane, as all interactive messages do: of a file that one leaves in the middle, the receiver
// may lose the last chunks, which the next attempt sends again (chapter 9).
//
// Anything the server will not do it answers with Goodbye, a reason and a sentence, and closes,
// also in the place of any answer above. It closes without a word on strangers for whom it has no
// slot, and on members whom it gives up because nothing reaches them any more.
//
// A login gets a number (LoginId) that is never used again while the server runs. Members are
// addressed by it and not by name: when bob leaves and comes back, he has new keys and a new
// number, and nothing that was sealed for the old bob can reach the new one by accident.
//
// What this does not protect against: the server. It writes Joined and Left, it hands out the
// cards, and it says for whom something was undeliverable. Whatever it says here is a claim;
// chapter 8 is about what remains true when it lies.

enum class LoginId : std::uint32_t {};

// Each message below says its own. (The gaps are for those that will come.)
enum class MessageType : std::uint8_t {};

// Chat overtakes file data: each direction of a connection has two queues (chapter 10).
enum class Lane : std::uint8_t { interactive = 0, bulk = 1 };
inline std::size_t index_of(Lane lane) { return lane == Lane::bulk ? 1 : 0; }  // in pairs of them

enum class GoodbyeReason : std::uint8_t {
    none = 0,       // nothing is wrong: the answer to Quit, or the server stops
    bad_login = 1,  // name or password wrong: which of them, nobody is told
    name_taken = 2,
    bad_account = 3,  // a registration that cannot be accepted
    registration_closed = 4,
    already_online = 5,
    server_full = 6,
    broke_protocol = 7,
    server_trouble = 8,  // the server's own problem: a full disk
    too_many_tries = 9,  // to log in or to register, in the last seconds
};

// ---- From the server, at any time ---------------------------------------------------------------

struct Welcome {
    static constexpr MessageType type{1};
    std::string server_version;
    std::uint8_t registration_open = 0;
    static void fields(auto& self, auto& io) { io(self.server_version, self.registration_open); }
};
struct Goodbye {
    static constexpr MessageType type{3};
    GoodbyeReason reason{};
    std::string sentence;
    static void fields(auto& self, auto& io) { io(self.reason, self.sentence); }
};

// ---- In both directions -------------------------------------------------------------------------

struct Ping {
    static constexpr MessageType type{4};
    std::uint64_t number = 0;
    static void fields(auto& self, auto& io) { io(self.number); }
};
struct Pong {
    static constexpr MessageType type{5};
    std::uint64_t number = 0;  // the Ping's
    static void fields(auto& self, auto& io) { io(self.number); }
};
struct Quit {
    static constexpr MessageType type{6};
    static void fields(auto&, auto&) {}
};

// ---- Login --------------------------------------------------------------------------------------

struct RegisterAccount {
    static constexpr MessageType type{10};
    std::string user;
    std::string verifier;  // ScramVerifier::text()
    Bytes identity;        // SPKI
    static void fields(auto& self, auto& io) { io(self.user, self.verifier, self.identity); }
};
struct Registered {
    static constexpr MessageType type{11};
    static void fields(auto&, auto&) {}
};
struct Scram {
    static constexpr MessageType type{12};
    std::string text;  // client-first, server-first, client-final
    Bytes ticket{};  // with client-first: what LoginDone gave the last time (chapter 11), or empty
    static void fields(auto& self, auto& io) { io(self.text, self.ticket); }
};
struct LoginDone {
    static constexpr MessageType type{15};
    std::string server_final;
    LoginId id{};
    Bytes identity{};  // SHA-256 of the identity that the account had so far (SPKI), or empty
    Bytes ticket{};    // to be shown at the next login
    static void fields(auto& self, auto& io) {
        io(self.server_final, self.id, self.identity, self.ticket);
    }
};

// ---- Who is here --------------------------------------------------------------------------------

struct PublishCard {
    static constexpr MessageType type{20};
    Bytes card;  // chapter 8
    static void fields(auto& self, auto& io) { io(self.card); }
};
struct Joined {
    static constexpr MessageType type{21};
    LoginId id{};
    std::string user;
    static void fields(auto& self, auto& io) { io(self.id, self.user); }
};
struct Ready {
    static constexpr MessageType type{22};
    static void fields(auto&, auto&) {}
};
struct Left {
    static constexpr MessageType type{23};
    LoginId id{};
    static void fields(auto& self, auto& io) { io(self.id); }
};
struct GetCard {
    static constexpr MessageType type{24};
    LoginId id{};
    static void fields(auto& self, auto& io) { io(self.id); }
};
struct CardOf {
    static constexpr MessageType type{25};
    LoginId id{};
    Bytes card;
    static void fields(auto& self, auto& io) { io(self.id, self.card); }
};

// ---- Payloads: the server carries them and cannot read them -------------------------------------

struct Send {
    static constexpr MessageType type{30};
    LoginId to{};
    Lane lane{};
    std::uint32_t tag = 0;  // the sender's number for it, which comes back in Undelivered
    ByteView payload;
    static void fields(auto& self, auto& io) { io(self.to, self.lane, self.tag, self.payload); }
};
struct Delivered {
    static constexpr MessageType type{31};
    LoginId from{};
    Lane lane{};
    ByteView payload;
    static void fields(auto& self, auto& io) { io(self.from, self.lane, self.payload); }
};

// A wrapped key is the small part of a room message that is different for each member (chapter 8).
inline constexpr std::size_t wrapped_key_bytes = 8 + 1 + 32 + gcm_tag_bytes;
using WrappedKey = std::array<std::uint8_t, wrapped_key_bytes>;

// Uploaded once for the whole room. `wrapped_keys` is a row of (LoginId, WrappedKey). A room that
// is too large for one record gets the same text in several Fanouts, each with the wrapped keys of
// other members.
struct Fanout {
    static constexpr MessageType type{32};
    static constexpr std::size_t entry_bytes = sizeof(std::uint32_t) + wrapped_key_bytes;
    std::uint32_t tag = 0;
    ByteView text;
    ByteView wrapped_keys;
    static void fields(auto& self, auto& io) { io(self.tag, self.text, self.wrapped_keys); }
};
// The wrapped key comes last, so that everything before it is the same for all members: the server
// keeps it once, however many queues it stands in.
struct RoomDelivered {
    static constexpr MessageType type{33};
    LoginId from{};
    ByteView text;
    WrappedKey wrapped_key{};
    static void fields(auto& self, auto& io) { io(self.from, self.text, self.wrapped_key); }
};
// There was no room in the queue of `to`. (Who has gone is not named here: their Left came before.)
struct Undelivered {
    static constexpr MessageType type{34};
    LoginId to{};
    std::uint32_t tag = 0;
    static void fields(auto& self, auto& io) { io(self.to, self.tag); }
};
// Every Fanout up to this one stands in the queues of all whom it names and for whom no Undelivered
// has come before this.
struct Taken {
    static constexpr MessageType type{35};
    std::uint32_t tag = 0;
    static void fields(auto& self, auto& io) { io(self.tag); }
};

// ---- Messages as bytes --------------------------------------------------------------------------

inline constexpr std::size_t message_header_bytes = 1 + 4;
// So that each message fits into a record.
inline constexpr std::size_t max_message_body = max_record_bytes - message_header_bytes;

// Appends type || length || body. The length is known only when the body stands there, so its place
// is kept and filled in afterwards. Throws Error if the body does not fit; then `out` is as before.
template <class T>
void append_message(Bytes& out, const T& message) {
    const std::size_t start = out.size();
    try {
        append_fields(out, T::type, std::uint32_t{0});
        encode_to(out, message);
        std::size_t body = out.size() - start - message_header_bytes;
        if (body > max_message_body) throw Error("A message must fit into a record.");
        auto length = frame_header(body);  // four bytes, as before a frame
        std::copy(length.begin(), length.end(), &out[start + sizeof(T::type)]);
    } catch (const Error&) {
        out.resize(start);
        throw;
    }
}
template <class T>
Bytes to_wire(const T& message) {
    Bytes out;
    append_message(out, message);
    return out;
}

// The body of a message, as the struct. Throws ProtocolError.
template <class T>
T from_wire(ByteView body) {
    return decode<T>(body, concat("a message of type ", static_cast<int>(T::type)));
}

struct Message {
    MessageType type{};
    ByteView body;
};

// A message that must be a T at this point of the conversation. Throws ProtocolError.
template <class T>
T from_wire_as(const Message& message) {
    if (message.type != T::type)
        throw ProtocolError(concat("Received a message of type ", static_cast<int>(message.type),
                                   " where one of type ", static_cast<int>(T::type),
                                   " was expected."));
    return from_wire<T>(message.body);
}

// Takes one message from the front of a record. Throws ProtocolError.
inline Message take_message(Reader& record) {
    Message message;
    record(message.type, message.body);
    return message;
}

// ---- Try it -------------------------------------------------------------------------------------
//
// Break: half-a-message-left (what a message that does not fit has written already stays in the
// record) and, of chapter 1, bytes-behind-the-end (bytes that nobody asked for, behind a message,
// are overlooked). Why is it a trap when two programs read the same bytes, and one overlooks some?
//
// Write a message of your own. A newcomer gets a thousand Joined, with a header for each. A ROSTER
// would be one message, of type 26:
//
//      struct Roster {                 // u16 count, then the fields of so many Joined
//          static constexpr MessageType type{26};
//          std::vector<Joined> all;    // and `fields`
//      };
//
// One function `fields` serves both ways, as ever, although reading has to make room for what
// comes. A count is a claim; and what if there are 70,000 people? (An Error, before anything is
// sent.)
// Green: exercise: roster

// =================================================================================================
//  Chapter 8. End to end
// =================================================================================================
//
// So far the server could read everything: it is one end of every hop channel. This chapter takes
// that away from it. Clients encrypt for clients; the server passes on what it cannot open (P4) and
// cannot change unnoticed (P5).
//
// Every user has an IDENTITY: an RSA key that the client makes once and keeps. For each login the
// client also makes an X25519 key, and publishes both in a signed CARD:
//
//      card = user (text) || identity key (blob, SPKI) || x25519 (32 bytes)
//             || issued (u64: microseconds since 1970, later than on every card before)
//             || run (u64: the `issued` of the first card that this program made since it started)
//             || RSA-PSS signature (blob) over "chatsecure card 1" and everything before it
//
// At most 2,048 bytes. SHA-256(card) is over all of it, signature included.
//
// For each direction of each pair of logins, on first need (agree() is in chapter 4):
//
//      A -> B   Open:    1 (u8) || card_A (blob) || encapsulated secret (blob)
//               encapsulated secret = RSA-OAEP(identity_B, secret[32],
//                                              label = SHA-256(card_A) || SHA-256(card_B))
//               keys     prk = agree(SHA-256(card_A) || SHA-256(card_B), secret, X25519(a, b))
//                        interactive = HKDF-Expand(prk, "chatsecure pair interactive lane")
//                        bulk        = HKDF-Expand(prk, "chatsecure pair bulk lane")
//      A -> B   Sealed:  2 (u8) || seq (u64) || AES-256-GCM( key of the lane, no aad,
//                                                           nonce = 0 (u32) || seq,
//                                                           kind (u8) || body )
//
// Both are payloads of Send (chapter 7). What A does and what B checks:
//
//   1. A has B's card (GetCard) and has sent its Open before it seals anything for B, also when
//      that is a room message. If the Open comes back (Undelivered), B has not seen it, and A makes
//      a new one, with a new secret, before the next thing; what was sealed under the first one B
//      cannot open. Its texts count as come back, too; an offer of a file is given up when nobody
//      answers, and a receipt is sent again when its text comes again.
//   2. B takes the card from CardOf or from the Open, whichever comes first, and checks its
//      signature, by the identity key that it holds; its name, which must be the one that the
//      server announced for this login; and that it is not B's own, nor one that B has met under
//      another number. Otherwise B uses nothing that this login sends. Then the pin (see below): of
//      somebody whose identity has changed, or whose card is older than one that B has seen, B
//      keeps the Open and the first texts and offers of files (100, of at most 128 KiB together),
//      and drops the rest, until its user has decided.
//   3. B takes one Open from each login, on the interactive lane, before anything sealed; its card
//      must be the one that B knows. Otherwise it is dropped, with a complaint. If it does not
//      open, B looks at nothing more of this login: each try costs an RSA operation.
//   4. seq counts for each lane, from 1. B drops what is not above the last one that opened. If it
//      is further than the next one, B takes it and tells how many are missing; above 2^32 it takes
//      none. What does not open is dropped with a complaint, and the next one may be good.
//
// What that gives:
//
//   - B knows that it is A: only A's login holds `a`, whose public half A's identity signed.
//   - A knows that only B reads it: only B's identity opens the secret.
//   - Nothing else is signed, so B cannot prove to a third person what A said: B could have made
//     all of it with the same keys. That is how a conversation between two people should be.
//   - There is one Open for a pair of cards: with a second one the server could play back what was
//     sealed under the first.
//
// A ROOM MESSAGE goes to everyone. Encrypting it anew for each of 500 members would be 500 times
// the bytes. So the text is sealed once, under a key k made for it alone, and each member gets k
// as a WRAPPED KEY: sealed for that pair.
//
//      sealed text = AES-256-GCM(k, nonce = twelve zero bytes, no aad, text)
//      wrapped key = seq || AES-256-GCM(interactive key, nonce = 0 (u32) || seq,
//                                       aad = SHA-256(sealed text), room_key (u8) || k)
//
// seq is the interactive lane's, one series for wrapped keys and private messages.
// The aad ties the wrapped key to this sealed text. Every member knows k, so every member could
// seal another text under it; but only the sender shares a key with you to wrap it with (P6).
//
// DELIVERY. TCP's acknowledgement says that a kernel has the bytes, not that a person's program has
// shown them. Only the two ends can know that (Saltzer, Reed and Clark, "End-to-end arguments in
// system design", 1984), so they say it to each other:
//
//      text     = id (u64) || UTF-8          what is sealed, in private and for the room: at most
//                                            32 KiB, and the id; what is longer is dropped
//      receipt  = id (u64) || id || ...      private messages that the sender of this has shown, as
//                                            many as fit into a message
//
//   - The id is the sender's, one series for the room and all private messages: it grows, and no
//     two messages of one user with one identity have the same. It goes on from `issued` of the
//     newest card, if it is not above that already.
//   - B answers private messages with receipts, one for many where many came at once, when they
//     were shown, and again for one that comes a second time. What came too late to be remembered
//     (see ShownIds) is neither shown nor confirmed.
//   - What has no receipt when B's login is gone waits a minute for B's next one. Has that the same
//     identity and the same `run`, it is sealed again, with the same id. Has it another `run`,
//     another program is there, which does not know what the one before has shown: so it is named
//     to the user as not delivered, for otherwise it might be shown twice.
//   - A room message is sent again with the same id if the connection broke before the server's
//     Taken came: to those who were here when it was sent the first time, and still when the
//     connection broke, with the same `run`; and not to who came later (they may have read newer
//     messages, and would see this one behind them). Whoever has shown an id does not show it
//     again.
//   - What comes back (Undelivered) is not sent again: the user is told whom it did not reach.
//
// So a server that lies about who is here or what was delivered can cause a second transmission,
// and never a second showing. And a card is met ONCE: for as long as our own card is used, a card
// that was seen under one number is nobody under another number, and so is whoever has our own
// name. Otherwise the server could announce bob again and play back all that he ever sent to us.
//
// Kinds belong to lanes: chunks of files on the bulk lane, everything else on the interactive one.
// Whatever else comes is dropped, an Open on the bulk lane without a computation, and so is a text
// of more than 32 KiB. An Open that does not open costs the receiver an RSA operation: after one
// such, nothing that this login sends is looked at any more.
//
// The weak point of all this is the first meeting: is the key on bob's card bob's, or one that the
// server made up? Clients PIN the identity that they see first ("trust on first use", as SSH does)
// and are loud when it changes. This pin waits for proof too: a card is signed by its own identity
// key, and one that is not is dropped before it is compared with anything. Whoever wants to be
// certain compares the SAFETY NUMBER with bob, by telephone or face to face: 60 digits computed
// from both identities. A server in the middle cannot make them agree.
//
//      fingerprint = SHA-256(identity key, SPKI)
//      half        = SHA-256("chatsecure safety number 1" || user (text) || fingerprint); its first
//                    30 bytes are six numbers of five bytes, each modulo 100,000, in five digits
//      number      = the half whose 30 digits are smaller, and then the other one
//
// 30 digits are about 100 bits: nobody finds a key with the same half by trying.
//
// A GHOST is somebody whom the server has invented: with a key of his own he is in the room like
// everybody else, and reads what is said to everybody. He cannot come in silence, for his name is
// announced and pinned; whoever does not want to rely on that limits the room to people whose
// safety number was compared: then nobody else is sent a key.
//
// What it does not protect against: a first meeting that was never verified; the other person;
// traffic analysis (the server sees who sends to whom, when, and how much); quantum computers that
// do not exist yet and open recordings of today.

inline constexpr std::size_t max_text_bytes = 32 * 1024;
inline constexpr std::size_t max_card_bytes = 2048;

// What is inside a sealed payload. The server never sees it.
enum class Kind : std::uint8_t {
    text = 1,         // a private message: its id, and UTF-8
    room_key = 2,     // a wrapped key: the key of a room message
    receipt = 3,      // ids of private messages that were shown: u64 each
    file_offer = 10,  // the rest: chapter 9
    file_accept = 11,
    file_credit = 12,
    file_chunk = 13,
    file_over = 14,
};

// ---- Cards --------------------------------------------------------------------------------------

struct Card {
    std::string user;
    Bytes identity_der;
    X25519Public ephemeral{};
    std::uint64_t issued = 0;  // microseconds since 1970: a later login has a larger one
    std::uint64_t run = 0;     // of the program that made it
    Bytes signature;

    static void fields(auto& self, auto& io) {
        io(self.user, self.identity_der, self.ephemeral, self.issued, self.run, self.signature);
    }

    Bytes signed_part() const {
        Bytes bytes = to_bytes(as_bytes("chatsecure card 1"));
        append_fields(bytes, user, identity_der, ephemeral, issued, run);
        return bytes;
    }
};

// A card whose signature was checked, with what one wants to know of it.
struct CheckedCard : Card {
    RsaPublicKey identity;
    Fingerprint fingerprint;
    Digest hash;

    // Throws ProtocolError if it is damaged, not signed by its own identity key, or not `owner`'s.
    CheckedCard(ByteView bytes, std::string_view owner)
        : Card(decode<Card>(bytes, "a key card")),
          identity(RsaPublicKey::from_der(identity_der, "A key card")),
          fingerprint(identity.fingerprint()),
          hash(sha256(bytes)) {
        if (bytes.size() > max_card_bytes || user != owner ||
            !identity.verify(signed_part(), signature))
            throw ProtocolError(concat("Received a key card for ", owner, " that is forged."));
    }
};

// One login's own keys: the identity that lasts, and the rest that ends with the login.
struct LoginKeys {
    const RsaPrivateKey& identity;
    const X25519Key ephemeral = X25519Key::generate();
    Bytes card_bytes;
    Digest card_hash{};
    Tracer trace;

    LoginKeys(const RsaPrivateKey& own, std::string_view user, std::uint64_t issued,
              std::uint64_t run = 0, Tracer on_looker = {})
        : identity(own), trace(std::move(on_looker)) {
        ephemeral.tell_private(trace, "X25519 key of our card");
        Card card{
            std::string(user), own.public_key().der(), ephemeral.public_key(), issued, run, {}};
        card.signature = own.sign(card.signed_part());
        card_bytes = encode(card);
        card_hash = sha256(card_bytes);
    }
};

// ---- Sealed payloads ----------------------------------------------------------------------------

// Far below any limit of AES-GCM, and still more than a login will ever send.
inline constexpr std::uint64_t max_sealed_per_lane = 1ULL << 32;

// One lane of one direction, at the sender.
class SealingLane {
  public:
    explicit SealingLane(const Secret<32>& key, Tracer trace = {})
        : cipher_(key), trace_(std::move(trace)) {}

    // `sealed` holds room for seq (8 bytes), then kind and body, then room for the tag.
    void seal_in_place(ByteSpan sealed, ByteView aad = {}) {
        if (seq_ == max_sealed_per_lane) throw Error("This login has sent too much: log in again.");
        ++seq_;
        for (std::size_t i = 0; i < 8; ++i)
            sealed[i] = static_cast<std::uint8_t>(seq_ >> (56 - 8 * i));
        ByteSpan text = sealed.subspan(8, sealed.size() - 8 - gcm_tag_bytes);
        SecretBytes plain;  // before it is overwritten
        if (trace_) plain.assign(text.begin(), text.end());
        cipher_.seal(Nonce(seq_), aad, text, sealed.last<gcm_tag_bytes>());
        if (trace_)
            trace_({TraceEvent::Layer::payload, TraceEvent::Way::out, sealed, plain, {}, seq_});
    }
    // Appends seq || ciphertext of (kind || body) || tag.
    void seal_to(Bytes& out, Kind kind, ByteView body, ByteView aad = {}) {
        std::size_t before = out.size();
        append_fields(out, std::uint64_t{0}, kind);
        append(out, body);
        out.resize(out.size() + gcm_tag_bytes);
        seal_in_place(ByteSpan(out).subspan(before), aad);
    }

  private:
    AesGcm cipher_;
    std::uint64_t seq_ = 0;
    Tracer trace_;
};

// What became of a sealed payload at the receiver.
struct OpenedPayload {
    enum class State { good, repeated, damaged } state = State::damaged;
    std::uint64_t lost = 0;  // how many before this one never arrived
    Kind kind{};
    ByteView body;  // lies in:
    Bytes buffer;

    OpenedPayload() = default;
    OpenedPayload(OpenedPayload&&) = default;  // a copy's body would lie in the original
    OpenedPayload& operator=(OpenedPayload&&) = default;
};

// One lane of one direction, at the receiver.
class OpeningLane {
  public:
    explicit OpeningLane(const Secret<32>& key, Tracer trace = {})
        : cipher_(key), trace_(std::move(trace)) {}

    // Opens in place. Never throws for anything the network can contain: a damaged payload is
    // reported, and the conversation goes on. (Unlike a damaged record: there the connection itself
    // is in doubt.) The buffer of what it returns is empty: the body lies in `sealed`.
    OpenedPayload open_in_place(ByteSpan sealed, ByteView aad) {
        OpenedPayload result;
        if (sealed.size() < 8 + 1 + gcm_tag_bytes) return result;
        std::uint64_t seq = 0;
        Reader(sealed.first(8), "a sealed payload")(seq);
        if (seq > max_sealed_per_lane) return result;
        if (seq <= last_seq_) {
            result.state = OpenedPayload::State::repeated;
            return result;
        }
        Bytes wire;  // before it is overwritten
        if (trace_) wire = to_bytes(sealed);
        std::optional<ByteSpan> plain = cipher_.open(Nonce(seq), aad, sealed.subspan(8));
        if (!plain) return result;
        if (trace_)
            trace_({TraceEvent::Layer::payload, TraceEvent::Way::in, wire, *plain, {}, seq});
        result.state = OpenedPayload::State::good;
        result.lost = seq - last_seq_ - 1;
        result.kind = static_cast<Kind>(plain->front());
        result.body = plain->subspan(1);
        last_seq_ = seq;
        return result;
    }
    // The same for what must not be changed: opens a copy, which it returns.
    OpenedPayload open(ByteView sealed, ByteView aad = {}) {
        Bytes copy = to_bytes(sealed);
        OpenedPayload result = open_in_place(copy, aad);
        result.buffer = std::move(copy);  // the bytes stay where they are
        return result;
    }

  private:
    AesGcm cipher_;
    std::uint64_t last_seq_ = 0;
    Tracer trace_;
};

namespace detail {

// The lanes of one direction, sealing or opening, as index_of() counts them. `a` is the card hash
// of the side that sends the Open, `b` of the one that gets it.
template <class AnyLane>
std::array<AnyLane, 2> pair_lanes(const Digest& a, const Digest& b, const Secret<32>& secret,
                                  const Secret<32>& x25519, const Tracer& trace = {},
                                  std::string_view who = {}) {
    Secret<32> prk = agree(join(a, b), secret, x25519, trace);
    auto lane = [&](std::string_view label, std::string_view name) {
        Tracer named;  // tells the same, and whose lane it is
        if (trace)
            named = [trace, key = concat(who, name)](TraceEvent event) {
                event.name = key;
                trace(event);
            };
        return AnyLane(hkdf_expand(prk, label, trace), std::move(named));
    };
    return {lane("chatsecure pair interactive lane", ", interactive lane"),
            lane("chatsecure pair bulk lane", ", bulk lane")};
}

}  // namespace detail

enum class PayloadType : std::uint8_t { open = 1, sealed = 2 };

// All that A sends to one login of B. Both lanes exist from the start; chapter 9 uses the second.
class PairSender {
  public:
    // One RSA encryption. `open_payload` is to be sent before anything that is sealed. Throws
    // ProtocolError for a card whose X25519 key cannot be used.
    PairSender(const LoginKeys& me, const CheckedCard& to, Bytes& open_payload)
        : lanes_(open_to(me, to, open_payload)) {}

    // One thread at a time for each lane.
    Bytes seal(Lane lane, Kind kind, ByteView body) {
        Bytes payload(1, static_cast<std::uint8_t>(PayloadType::sealed));
        lanes_[index_of(lane)].seal_to(payload, kind, body);
        return payload;
    }
    // The whole payload, with room for what is not known yet, as SealingLane wants it.
    void seal_in_place(Lane lane, ByteSpan payload) {
        payload[0] = static_cast<std::uint8_t>(PayloadType::sealed);
        lanes_[index_of(lane)].seal_in_place(payload.subspan(1));
    }
    WrappedKey wrap_key(const Secret<32>& room_key, const Digest& sealed_text_hash) {
        Bytes wrapped;
        lanes_[0].seal_to(wrapped, Kind::room_key, room_key.view(), sealed_text_hash);
        return to_fixed<wrapped_key_bytes>(wrapped);
    }

  private:
    static std::array<SealingLane, 2> open_to(const LoginKeys& me, const CheckedCard& to,
                                              Bytes& open_payload) {
        Secret<32> secret = random_secret<32>();
        Bytes encapsulated = to.identity.encrypt(secret, join(me.card_hash, to.hash));
        Secret<32> x25519 = me.ephemeral.shared_secret(to.ephemeral);
        append_fields(open_payload, PayloadType::open, me.card_bytes, encapsulated);
        return detail::pair_lanes<SealingLane>(me.card_hash, to.hash, secret, x25519, me.trace,
                                               concat("to ", to.user));
    }

    std::array<SealingLane, 2> lanes_;
};

// An Open, taken apart. Throws ProtocolError.
struct OpenPayload {
    ByteView card, encapsulated;
    static void fields(auto& self, auto& io) { io(self.card, self.encapsulated); }
};

// All that arrives from one login of A.
class PairReceiver {
  public:
    // One RSA decryption (about a millisecond). Throws ProtocolError if it is not for us.
    PairReceiver(const LoginKeys& me, const CheckedCard& from, ByteView encapsulated)
        : lanes_(opened_by(me, from, encapsulated)) {}

    OpenedPayload open(Lane lane, ByteView sealed) { return lanes_[index_of(lane)].open(sealed); }
    // Opens in place: a room key (if its kind is that) lies in `wrapped`, which wipes it.
    OpenedPayload unwrap_key(Secret<wrapped_key_bytes>& wrapped, const Digest& sealed_text_hash) {
        return lanes_[0].open_in_place(wrapped.span(), sealed_text_hash);
    }

  private:
    static std::array<OpeningLane, 2> opened_by(const LoginKeys& me, const CheckedCard& from,
                                                ByteView encapsulated) {
        std::optional<Secret<32>> secret =
            me.identity.decrypt(encapsulated, join(from.hash, me.card_hash));
        if (!secret)
            throw ProtocolError(concat("The keys that came from ", from.user, " do not open."));
        return detail::pair_lanes<OpeningLane>(from.hash, me.card_hash, *secret,
                                               me.ephemeral.shared_secret(from.ephemeral), me.trace,
                                               concat("from ", from.user));
    }

    std::array<OpeningLane, 2> lanes_;
};

// ---- Room messages ------------------------------------------------------------------------------

struct SealedRoomText {
    Bytes sealed;
    Secret<32> key;  // used for this text only, which is why its nonce may be 0
};
inline SealedRoomText seal_room_text(std::string_view text, const Tracer& trace = {}) {
    SealedRoomText result{to_bytes(as_bytes(text)), random_secret<32>()};
    result.sealed.resize(text.size() + gcm_tag_bytes);
    ByteSpan all(result.sealed);
    AesGcm(result.key).seal(Nonce(0), {}, all.first(text.size()), all.last<gcm_tag_bytes>());
    if (trace)
        trace(
            {TraceEvent::Layer::room_text, TraceEvent::Way::out, all, as_bytes(text), "room key"});
    return result;
}
// Nothing if `key` does not open it.
inline std::optional<std::string> open_room_text(ByteView sealed, const Secret<32>& key,
                                                 const Tracer& trace = {}) {
    Bytes copy = to_bytes(sealed);
    std::optional<ByteSpan> text = AesGcm(key).open(Nonce(0), {}, copy);
    if (!text) return std::nullopt;
    if (trace)
        trace({TraceEvent::Layer::room_text, TraceEvent::Way::in, sealed, *text, "room key"});
    return to_string(*text);
}

// ---- Delivery -----------------------------------------------------------------------------------

// What is sealed as a text.
struct Text {
    std::uint64_t id = 0;
    std::string words;

    Bytes encoded() const {
        Bytes bytes;
        append_fields(bytes, id);
        append(bytes, as_bytes(words));
        return bytes;
    }
    // Nothing for what no honest client seals.
    static std::optional<Text> decoded(ByteView bytes) {
        Text text;
        if (bytes.size() < sizeof text.id || bytes.size() > sizeof text.id + max_text_bytes)
            return std::nullopt;
        Reader(bytes.first(sizeof text.id), "a text")(text.id);
        text.words = to_string(bytes.subspan(sizeof text.id));
        return text;
    }
};

// Which messages of one user with one identity were shown: the newest ids, and everything below.
class ShownIds {
  public:
    enum class Verdict { fresh, shown, too_old };

    Verdict judge(std::uint64_t id) const {
        if (std::binary_search(ids_.begin(), ids_.end(), id)) return Verdict::shown;
        return id <= below_ ? Verdict::too_old : Verdict::fresh;
    }
    void add(std::uint64_t id) {
        if (judge(id) != Verdict::fresh) return;
        ids_.insert(std::lower_bound(ids_.begin(), ids_.end(), id), id);
        if (ids_.size() <= most) return;
        below_ = ids_.front();
        ids_.pop_front();
    }

  private:
    static constexpr std::size_t most = 512;
    std::deque<std::uint64_t> ids_;  // ascending
    std::uint64_t below_ = 0;        // whatever is not above this has been shown, or never will be
};

// ---- Trust --------------------------------------------------------------------------------------

// 60 digits in groups of five, with blanks between them, the same on both sides.
inline std::string safety_number(std::string_view user_a, const Fingerprint& a,
                                 std::string_view user_b, const Fingerprint& b) {
    auto half = [](std::string_view user, const Fingerprint& fingerprint) {
        Bytes input = to_bytes(as_bytes("chatsecure safety number 1"));
        append_fields(input, std::string(user), fingerprint.digest);
        Digest digest = sha256(input);
        std::string digits;
        for (std::size_t group = 0; group < 6; ++group) {
            std::uint64_t value = 0;
            for (std::size_t i = 0; i < 5; ++i) value = value << 8 | digest[5 * group + i];
            std::string number = std::to_string(value % 100'000);
            digits += concat(group == 0 ? "" : " ", std::string(5 - number.size(), '0'), number);
        }
        return digits;
    };
    std::string first = half(user_a, a), second = half(user_b, b);
    if (second < first) std::swap(first, second);
    return concat(first, " ", second);
}

// What we know about a user's identity.
struct Pin {
    Fingerprint fingerprint;
    std::uint64_t issued = 0;  // of the newest card that we saw, but not far in the future
    bool verified = false;     // the safety number was compared
    bool met = true;           // only met in the room so far: we never wrote to them alone
};

// The file known_users: one line for each pinned user,
//
//      bob SHA256:<fingerprint> <issued of the newest card> verified
//
// (or "unverified", or "met" for somebody to whom we have never written alone). A server can invent
// people for as long as it likes; so of those who were only met, no more than some thousand are
// kept. Who comes after them is not pinned, and nobody is forgotten to make room: otherwise the
// server could wash out the pin of somebody real. One thread uses it.
class PinStore {
  public:
    enum class Verdict {
        first_seen,  // pinned now
        known,       // the pinned identity, and a card that is not older than the newest
        changed,     // another identity: trust nothing until the user says so
        replayed,    // the right identity, but an old card: a recording, or a clock set back
    };

    // No file means no pins. Throws Error, with the line number, for a damaged line.
    explicit PinStore(std::filesystem::path path) : path_(std::move(path)) {
        read_lines(
            path_, 64U << 20, "Correct or remove the line.",
            [&](const std::vector<std::string>& words) {
                if (words.size() != 4 || !has_form_of_name(words[0]) ||
                    (words[3] != "verified" && words[3] != "unverified" && words[3] != "met"))
                    throw Error("it is damaged.");
                auto issued = parse_number<std::uint64_t>(words[2]);
                if (!issued) throw Error("its number is damaged.");
                Pin pin{Fingerprint::parse(words[1]), *issued, words[3] == "verified",
                        words[3] == "met"};
                met_ += pin.met ? 1 : 0;
                if (!pins_.emplace(words[0], pin).second)
                    throw Error(concat("the name \"", words[0], "\" stands there twice."));
            });
    }

    const Pin* find(const std::string& user) const {
        auto found = pins_.find(user);
        return found == pins_.end() ? nullptr : &found->second;
    }

    // Compares a card with the pin; pins the first one, and remembers the newest. The newest card
    // itself may come again: it belongs to a login that is still there, or to one that took its
    // X25519 key with it, and then nobody can use the card.
    Verdict judge(const CheckedCard& card) {
        auto found = pins_.find(card.user);
        if (found == pins_.end()) {
            if (met_ == max_met) return Verdict::first_seen;  // each time
            pins_[card.user] = Pin{card.fingerprint, not_far_ahead(card.issued)};
            ++met_;
            dirty_ = true;
            return Verdict::first_seen;
        }
        Pin& pin = found->second;
        if (pin.fingerprint != card.fingerprint) return Verdict::changed;
        std::uint64_t issued = not_far_ahead(card.issued);
        if (issued < pin.issued) return Verdict::replayed;
        dirty_ = dirty_ || issued > pin.issued;
        pin.issued = issued;
        return Verdict::known;
    }
    // We write to them alone: their pin stays.
    void keep(const CheckedCard& card) {
        Pin& pin =
            pins_.try_emplace(card.user, Pin{card.fingerprint, not_far_ahead(card.issued), false})
                .first->second;
        note_not_only_met(pin);
    }

    // The user has decided: from now on this is the identity, and the card is new enough.
    void trust(const CheckedCard& card) {
        keep(card);
        Pin& pin = pins_.at(card.user);
        bool verified = pin.verified && pin.fingerprint == card.fingerprint;
        pin = Pin{card.fingerprint, not_far_ahead(card.issued), verified, false};
        dirty_ = true;
    }
    void set_verified(const std::string& user, bool verified) {
        Pin& pin = pins_.at(user);
        note_not_only_met(pin);
        pin.verified = verified;
        dirty_ = true;
    }

    // For one's own card: later than now and than every card before, even if the clock was set
    // back.
    std::uint64_t next_issued(const std::string& user, const Fingerprint& own) {
        Pin& pin = pins_.try_emplace(user, Pin{own, 0, true, false}).first->second;
        note_not_only_met(pin);
        std::uint64_t issued = std::max(microseconds_now(), pin.issued + 1);
        pin = Pin{own, issued, true, false};
        dirty_ = true;
        return issued;
    }

    // Writes the file if anything has changed since the last time. Blocks (fsync); throws Error.
    void save() {
        if (!dirty_) return;
        std::string content;
        for (const auto& [user, pin] : pins_)
            content += concat(user, " ", pin.fingerprint.text(), " ", pin.issued, " ",
                              pin.verified ? "verified"
                              : pin.met    ? "met"
                                           : "unverified",
                              "\n");
        write_file(path_, as_bytes(content), FileMode::owner_only);
        dirty_ = false;
    }

  private:
    static std::uint64_t microseconds_now() {
        auto now = std::chrono::system_clock::now().time_since_epoch();
        return static_cast<std::uint64_t>(
            std::chrono::duration_cast<std::chrono::microseconds>(now).count());
    }
    // Whose clock was once ten years ahead must not be an old card for ten years.
    static std::uint64_t not_far_ahead(std::uint64_t issued) {
        constexpr std::uint64_t a_day = 86'400'000'000;
        return std::min(issued, microseconds_now() + a_day);
    }
    void note_not_only_met(Pin& pin) {
        if (!std::exchange(pin.met, false)) return;
        --met_;
        dirty_ = true;
    }

    static constexpr std::size_t max_met = 4096;
    std::filesystem::path path_;
    std::map<std::string, Pin> pins_;
    std::size_t met_ = 0;  // how many of them were only met
    bool dirty_ = false;
};

// ---- Try it -------------------------------------------------------------------------------------
//
// Break: one-lane (chat and files are sealed with the same key), repeated-once-more (a message that
// came already counts once more) and safety-number-of-the-name (the safety number does not depend
// on the keys).
//
// Write a SEALED SENDER: a payload that does not say from whom it is, to whoever carries it, nor
// whether two are from the same. Open carries the sender's card in the clear; it need not. Put an
// Open and a Sealed with a text into one box (chapter 4's exercise) that its reader alone can open:
//
//      Bytes seal_without_name(const LoginKeys& me, const CheckedCard& to, std::string_view text)
//      std::optional<std::pair<CheckedCard, std::string>>  // who says what; never throws
//      open_without_name(const LoginKeys& me, ByteView payload)
//
// Whose name is on the card is for the reader to judge (PinStore).
// Green: exercise: sealed sender
//
// And how far did you get? The server does not read the name, but it knows on whose connection the
// payload came, and when. What else would have to change, and who could send you spam then? And
// what if it hands out the payload twice?

// =================================================================================================
//  Chapter 9. Files
// =================================================================================================
//
// A file is only a long message, and yet four things go wrong when it is treated as one. It does
// not fit into memory. It takes minutes, and meanwhile people want to chat. It arrives on a disk,
// where it can do harm. And half of it is worthless, when the connection breaks near the end.
//
// This chapter moves files of any size in constant memory, several at a time, only to people who
// said yes, and goes on where it was interrupted. A transfer, all of it sealed as in chapter 8, so
// that the server does not even see that it is one:
//
//         alice                                  bob
//
//      1. FileOffer(id, name, size, modified) -->     bob is asked; no byte moves before he answers
//      2. <-- FileAccept(id, offset, SHA-256 of what he has already, credit)
//      3. FileChunk(id, offset, bytes) -->            on the bulk lane, at most 60 KiB each
//         <-- FileCredit(id, credit)                  as bob's disk takes them
//         FileChunk ... -->
//      4. <-- FileOver(id, receiver, "")              it is on bob's disk, whole
//
//      At any time, from either side: FileOver(id, who says it, why), which ends it.
//
// Each step, its reason, and what the other side checks. What is against a rule ends this transfer,
// with a FileOver, and nothing else.
//
//   1. `id` numbers alice's offers, to whomever: the first is 1, and it grows with each. One that
//      is not larger than her last one to this login is ignored. Everything else refers to it. At
//      most 16 of her offers to bob wait or run at a time; one that is too many gets a FileOver,
//      and after 64 of those no answer. What bob sees of the name is what he would get on his disk.
//   2. Once for each offer. The answer says how much bob has already from an earlier attempt (less
//      than the whole, unless the file is empty), and its hash: with offset 0 that of the empty
//      string. An empty file is answered like any other, and has no chunks. If alice's file begins
//      with the same bytes, her first chunk goes on behind them; if not, its offset is 0. (Bob
//      tells nothing that alice did not send: what he has belongs to the identity that sent it.)
//   3. CREDIT is the number of bytes that alice may send, counted from the beginning of this
//      attempt; FileAccept has the first, and it may be more than the file needs. Each FileCredit
//      is larger than the one before, and at most 4 MiB ahead of what she has sent. Bob raises it
//      as his disk takes what came, so at most 4 MiB of all his transfers together are ever under
//      way, in queues and buffers between the two disks. SSH and HTTP/2 do the same and call it a
//      window. Without it a fast sender fills the server's memory, or, if the server stops reading,
//      her chat waits behind her file. A number that only grows is hard to get wrong: it cannot be
//      "added twice". (This is flow control, which spares the receiver. Congestion control spares
//      the network in between, and is left to TCP.) Chunks come in order, and each says where it
//      belongs, counted from the file's beginning: behind the last one, within the size that was
//      offered and the credit. A gap means that something was lost. No chunk is empty. Each costs
//      bob memory besides its bytes: if more than 4096 wait for his disk (4 MiB in pieces of 1
//      KiB), the transfer ends.
//   4. Until then the file has another name, which ends in .part. It is written, synced to the
//      disk, and only then gets its name: NAME is whole or not there (P11).
//
// Where a received file may go is the other half of the chapter (P9). The name comes from another
// person, and "../../.ssh/authorized_keys" is a name too. safe_file_name() leaves what can only be
// a name; the file is created new (O_EXCL), never over another one and never through a link; a name
// that is taken becomes "NAME (1)".
//
// A part is called NAME.<8 hexadecimal digits>.part. The digits are the beginning of a hash over
// who sent it (the identity, not the name), what it was called and how large it was to become, so
// that the next attempt finds it without a list that could be wrong, and nobody else's does.
//
// A transfer is a STATE MACHINE, the same for both sides. A machine that is not written down has
// states that nobody thought of; this is all of it:
//
//      state        at the sender                          at the receiver
//      -----------  -------------------------------------  ---------------------------------------
//      queued       16 others to this person come first    the user has said yes; there is no place
//      offered      FileOffer is sent                      FileOffer has come; the user is asked
//      preparing    reads and hashes what they have        opens the part, hashes what is there
//      moving       sends as far as the credit goes        writes what comes
//      finishing    all is sent                            all is here: synced and renamed
//      interrupted  the other one is out of reach, but     likewise
//                   had said yes, or was not asked yet
//
//      event              sender                           receiver
//      -----------------  -------------------------------  ---------------------------------------
//      a place is free    queued -> offered: FileOffer     queued -> preparing
//      the user: yes                                       offered -> queued; else "already"
//      the user: no       over, in each state              over; finishing: "It is all here"
//      FileAccept         offered -> preparing; else !
//      the disk is ready  preparing -> moving              preparing -> moving: FileAccept
//                                                          (nothing missing: -> finishing)
//      no room on it                                       preparing -> offered, if a person said
//                                                          yes; else over
//      FileCredit         preparing, moving: more;
//                         finishing: nothing; else !
//      FileChunk                                           moving: written; the last: -> finishing
//                                                          finishing: nothing; else !
//      the disk has done  moving: progress;                moving: FileCredit
//                         all: -> finishing
//      it is published                                     finishing: stored, FileOver ""
//      FileOver ""        all handed out: stored; else !   over
//      FileOver why       over                             over; finishing: nothing
//      a message is lost  over                             over; finishing: nothing
//      the disk fails     over                             over
//      the other is gone  queued, or accepted ever:        offered: over; finishing: nothing
//                         -> interrupted; else over        else -> interrupted
//      and back           interrupted -> queued            (the same offer) interrupted -> queued
//      10 minutes         all but queued and preparing:    moving, if they are to blame, or
//                         over                             interrupted: over
//
//      The 10 minutes are some more for a large file, which has to be read and hashed first.
//      "The same offer" is a new FileOffer, with a new id, of the same identity, name, size and
//      time of change. !: against the rules, so over. What cannot happen to a side is ignored.
//      "over" means that the other side gets a FileOver (if it is in reach) and the user a
//      sentence, and that the transfer is forgotten.
//
// Threads. Disks wait: a spun-down one for seconds, a network drive for ever. So the machine
// itself, FileTransfers, does no input or output. It takes messages, commands, the disk's answers
// and the time; it gives messages, events and requests to the disk. Each running transfer has a
// WORKER, a thread that does these requests in their order and posts the answers to the engine
// (chapter 12).
//
// What it does not protect against: what is in the file. Being asked is not being safe.

inline std::string readable_size(std::uint64_t bytes);  // chapter 13

// ---- What the two sides say to each other -------------------------------------------------------

inline constexpr std::size_t file_chunk_bytes = 60 * 1024;  // with everything around it: one record
inline constexpr std::uint64_t credit_total = 4 << 20;      // of one receiver, for all transfers
inline constexpr std::uint64_t credit_floor = 64 * 1024;    // that each transfer can count on
inline constexpr std::size_t max_files_receiving = 16;      // at the same time; others are queued

struct FileOffer {
    static constexpr Kind kind = Kind::file_offer;
    std::uint32_t id = 0;
    std::string name;
    std::uint64_t size = 0;
    std::uint64_t modified = 0;  // nanoseconds since 1970; 0: not known
    static void fields(auto& self, auto& io) { io(self.id, self.name, self.size, self.modified); }
};
struct FileAccept {
    static constexpr Kind kind = Kind::file_accept;
    std::uint32_t id = 0;
    std::uint64_t offset = 0;  // so many bytes are here from an earlier attempt
    Digest held{};             // their SHA-256
    std::uint64_t credit = 0;
    static void fields(auto& self, auto& io) { io(self.id, self.offset, self.held, self.credit); }
};
struct FileCredit {
    static constexpr Kind kind = Kind::file_credit;
    std::uint32_t id = 0;
    std::uint64_t credit = 0;
    static void fields(auto& self, auto& io) { io(self.id, self.credit); }
};
struct FileChunk {
    static constexpr Kind kind = Kind::file_chunk;
    std::uint32_t id = 0;
    std::uint64_t offset = 0;
    ByteView bytes;
    static void fields(auto& self, auto& io) { io(self.id, self.offset, self.bytes); }
};
// Both sides count their own offers, so it says whether it comes from the one who sends the file.
// `why` goes on where "bob" stops: "declined it". Empty, from the receiver: stored.
struct FileOver {
    static constexpr Kind kind = Kind::file_over;
    std::uint32_t id = 0;
    std::uint8_t by_sender = 0;
    std::string why;
    static void fields(auto& self, auto& io) { io(self.id, self.by_sender, self.why); }
};
inline constexpr std::size_t max_why_bytes = 200;  // of it that are shown

// A transfer that cannot go on, as this side says it to its user, and as the other side hears it.
struct FileError : Error {
    std::string why;
    FileError(const std::string& sentence, std::string_view for_the_other)
        : Error(sentence), why(for_the_other) {}
};
struct NoRoom : FileError {  // before anything was written
    using FileError::FileError;
};

// Whoever writes a client in another language has now read everything for it. The rest of this
// chapter is how this program does it: names, disks, threads and the machine.

// ---- Names --------------------------------------------------------------------------------------

inline constexpr std::size_t max_file_name_bytes = 200;  // file systems take 255; we add to it

// The name that an offered file gets here. Whatever it is given, the result is one component of a
// path, not hidden, valid UTF-8 without control characters, no device of any system, and not longer
// than max_file_name_bytes.
inline std::string safe_file_name(std::string_view offered) {
    std::size_t slash = offered.find_last_of("/\\");  // both, wherever the sender lives
    if (slash != offered.npos) offered.remove_prefix(slash + 1);
    std::string name;
    while (!offered.empty()) {
        std::string_view before = offered;
        char32_t point = take_code_point(offered);
        bool special =
            point < 0x80 &&
            std::string_view("<>:\"|?*").find(static_cast<char>(point)) != std::string_view::npos;
        if (point == invalid_code_point || drives_the_screen(point) || special)
            name += '_';
        else
            name += before.substr(0, before.size() - offered.size());
    }
    auto trim = [](std::string& text) {  // a leading dot hides; Windows drops trailing ones
        text.erase(0, std::min(text.find_first_not_of(". "), text.size()));
        text.erase(text.find_last_not_of(". ") + 1);
    };
    trim(name);
    auto shorten = [&] {  // before the extension, and between two letters
        if (name.size() <= max_file_name_bytes) return;
        std::size_t dot = name.rfind('.');
        std::string extension = dot != name.npos && name.size() - dot <= 16 ? name.substr(dot) : "";
        std::size_t end = max_file_name_bytes - extension.size();
        while ((static_cast<std::uint8_t>(name[end]) & 0xc0) == 0x80) --end;
        name.erase(end);
        trim(name);
        name += extension;
    };
    shorten();
    std::string device;  // CON, com1.txt: names of devices on Windows, whatever follows the dot
    for (char c : name.substr(0, name.find('.')))
        device += c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c;
    device.erase(device.find_last_not_of(' ') + 1);
    std::string_view port = device.starts_with("COM") || device.starts_with("LPT")
                                ? std::string_view(device).substr(3)
                                : std::string_view();
    bool numbered = (port.size() == 1 && port[0] >= '0' && port[0] <= '9') || port == "\u00b9" ||
                    port == "\u00b2" || port == "\u00b3";  // 1, 2, 3, raised
    if (numbered || device == "CON" || device == "PRN" || device == "AUX" || device == "NUL" ||
        device == "CONIN$" || device == "CONOUT$" || name.starts_with('-')) {  // -rf is no option
        name.insert(0, "_");
        shorten();
    }
    return name.empty() ? "file" : name;
}

// "report.pdf", "report (1).pdf", "report (2).pdf" ...
inline std::string numbered_name(const std::string& name, unsigned number) {
    if (number == 0) return name;
    std::size_t dot = name.rfind('.');
    std::size_t stem = dot == name.npos || dot == 0 ? name.size() : dot;
    return concat(name.substr(0, stem), " (", number, ")", name.substr(stem));
}

// ---- Open files ---------------------------------------------------------------------------------

namespace detail {

struct FileAttributes {
    bool regular = false, directory = false;
    std::uint64_t size = 0;
    std::uint64_t modified = 0;  // nanoseconds since 1970; 0: not known
    friend bool operator==(const FileAttributes&, const FileAttributes&) = default;
};

// What each system does in its own way: chapter 14. All return a negative number (or false) when
// they fail, and errno says why.

inline int open_to_send(const std::filesystem::path& path);
inline int open_part(const std::filesystem::path& path, bool create);  // true: must not exist
inline bool attributes_of(int file, FileAttributes& attributes);
inline std::ptrdiff_t read_some_at(int file, ByteSpan into, std::uint64_t offset);
inline bool truncate_file(int file, std::uint64_t size);
inline bool lock_file(int file);  // false only if somebody else has it
inline void set_modified(int file, std::uint64_t nanoseconds);
// Gives a file another name, unless something has that name (then errno is EEXIST).
inline int rename_to_free(const std::filesystem::path& from, const std::filesystem::path& to);
inline bool is_disk_full(int error);

// An open file; closes it when destroyed. One thread at a time uses it.
class File {
  public:
    explicit File(int handle) : handle_(handle) {}
    File(File&& other) noexcept : handle_(std::exchange(other.handle_, -1)) {}
    File& operator=(File&& other) noexcept {
        File old(std::move(*this));
        handle_ = std::exchange(other.handle_, -1);
        return *this;
    }
    ~File() {
        if (handle_ >= 0) close_file(handle_);
    }
    bool is_open() const { return handle_ >= 0; }
    int handle() const { return handle_; }

    // Reads until `into` is full or the file ends; returns how much that was, or nothing if it
    // cannot be read (errno says why).
    std::optional<std::size_t> read_at(std::uint64_t offset, ByteSpan into) const {
        std::size_t done = 0;
        while (done < into.size()) {
            std::ptrdiff_t got = read_some_at(handle_, into.subspan(done), offset + done);
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) return std::nullopt;
            if (got == 0) break;
            done += static_cast<std::size_t>(got);
        }
        return done;
    }
    bool write_at(std::uint64_t offset, ByteView bytes) const {
        return write_all_at(handle_, bytes, offset);
    }

  private:
    int handle_;
};

// How many bytes fit on the disk of a directory, which need not exist yet.
inline std::uint64_t free_space(std::filesystem::path directory) {
    std::error_code failure;
    while (!std::filesystem::exists(directory, failure) && directory.has_relative_path())
        directory = directory.parent_path();
    std::filesystem::space_info space = std::filesystem::space(directory, failure);
    return failure || space.capacity == 0 ? UINT64_MAX : space.available;  // not known
}

// The hash of a file's first `size` bytes; nothing if it is shorter, cannot be read, or `stop`.
// Blocks: about a second for two gigabytes.
inline std::optional<Digest> hash_of_beginning(const File& file, std::uint64_t size,
                                               const std::atomic<bool>& stop) {
    Sha256 hash;
    Bytes block(256 * 1024);
    for (std::uint64_t offset = 0; offset < size;) {
        auto want = static_cast<std::size_t>(std::min<std::uint64_t>(block.size(), size - offset));
        ByteSpan part = ByteSpan(block).first(want);
        if (stop.load() || file.read_at(offset, part) != want) return std::nullopt;
        hash.update(part);
        offset += want;
    }
    return hash.finish();
}

}  // namespace detail

// A file that is offered: opened once, so that it is the same one however its name changes.
class SourceFile {
  public:
    // Throws Error for what cannot be sent.
    explicit SourceFile(const std::filesystem::path& path)
        : path_(path), file_(detail::open_to_send(path)) {
        if (!file_.is_open() || !detail::attributes_of(file_.handle(), attributes_))
            throw Error(concat("Cannot read ", path.string(), ": ", system_reason(), "."));
        if (attributes_.directory)
            throw Error(concat(path.string(),
                               " is a directory. Pack it into one file, with tar or zip, and send "
                               "that."));
        if (!attributes_.regular)
            throw Error(concat(path.string(), " is a device or a pipe, and has no end to send."));
    }
    std::string name() const { return path_.filename().string(); }
    std::uint64_t size() const { return attributes_.size; }
    std::uint64_t modified() const { return attributes_.modified; }

    // Fills `into`. Throws FileError if the file has changed or does not let itself be read. (So
    // the last chunk is not sent of a file that changed while it was being read.)
    void read(std::uint64_t offset, ByteSpan into) const {
        std::optional<std::size_t> got = file_.read_at(offset, into);
        if (!got)
            throw FileError(concat("Cannot read ", path_.string(), ": ", system_reason(), "."),
                            "stopped: the file cannot be read any more");
        detail::FileAttributes now;
        if (!detail::attributes_of(file_.handle(), now) || now != attributes_ ||
            *got != into.size())
            throw FileError(
                concat(path_.string(),
                       " changed while it was being sent. Offer it again when it is finished."),
                "stopped: the file changed while it was being sent");
    }
    // Nothing if it cannot be read, or `stop`.
    std::optional<Digest> hash_of_beginning(std::uint64_t size,
                                            const std::atomic<bool>& stop) const {
        return detail::hash_of_beginning(file_, size, stop);
    }

  private:
    std::filesystem::path path_;
    detail::File file_;
    detail::FileAttributes attributes_;
};

// A file that is being received: a part, and later the file. If nothing has come when it is
// destroyed, nothing stays.
class PartFile {
  public:
    // What an earlier attempt has left under this name in the directory, if that is smaller than
    // `size`, or else a new, empty one. A name that something else has (a link, a directory, the
    // part of a transfer that is still running) becomes "NAME (1)". Makes the directory when
    // needed. Throws FileError.
    PartFile(const std::filesystem::path& directory, const std::string& name, std::uint64_t size) {
        std::error_code failure;
        std::filesystem::create_directories(directory, failure);
        if (failure)
            throw FileError(concat("Cannot create the folder ", directory.string(), ": ",
                                   failure.message(), "."),
                            cannot_write_there);
        for (unsigned number = 0; number < max_numbers; ++number) {
            path_ = directory / path_of(numbered_name(name, number) + ".part");
            if (open_earlier(size) || open_new()) return;
            if (errno != EEXIST) throw cannot_write(path_);
        }
        throw too_many(name, directory);
    }
    PartFile(const PartFile&) = delete;
    PartFile& operator=(const PartFile&) = delete;
    ~PartFile() {
        std::error_code ignored;  // then it stays, empty
        if (file_.is_open() && size_ == 0 && !published_) std::filesystem::remove(path_, ignored);
    }

    std::uint64_t size() const { return size_; }
    const std::filesystem::path& path() const { return path_; }
    // Nothing if it cannot be read, or `stop`.
    std::optional<Digest> hash(const std::atomic<bool>& stop) const {
        return detail::hash_of_beginning(file_, size_, stop);
    }

    // All three throw FileError; what is there stays.
    void append(ByteView bytes) {
        if (!file_.write_at(size_, bytes)) throw cannot_write(path_);
        size_ += bytes.size();
    }
    void clear() {  // it was the beginning of another file
        if (!detail::truncate_file(file_.handle(), 0)) throw cannot_write(path_);
        size_ = 0;
    }
    // It is complete: syncs it to the disk and gives it its name in its folder, or the next free
    // one. Returns that path. Blocks as long as the disk needs.
    std::filesystem::path publish(const std::string& name, std::uint64_t modified) {
        if (modified != 0) detail::set_modified(file_.handle(), modified);
        if (detail::sync_file(file_.handle()) != 0) throw cannot_write(path_);
        for (unsigned number = 0; number < max_numbers; ++number) {
            std::filesystem::path target = path_;
            target.replace_filename(path_of(numbered_name(name, number)));
            if (detail::rename_to_free(path_, target) == 0) {
                published_ = true;
                if (!detail::sync_directory(detail::directory_of(target)))
                    throw FileError(concat(target.string(), " is complete, but may not survive a ",
                                           "crash: its folder cannot be synced to the disk: ",
                                           system_reason(), "."),
                                    cannot_write_there);
                return target;
            }
            if (errno == ENOENT)
                throw FileError(concat(path_.string(), " is gone: it was removed or moved while ",
                                       "it was received."),
                                cannot_write_there);
            if (errno != EEXIST) throw cannot_write(target);
        }
        throw too_many(name, path_.parent_path());
    }

  private:
    static constexpr unsigned max_numbers = 10'000;
    static constexpr const char* cannot_write_there = "stopped: the file cannot be written there";

    bool open_earlier(std::uint64_t size) {
        file_ = detail::File(detail::open_part(path_, false));
        detail::FileAttributes there;
        if (!file_.is_open() || !detail::attributes_of(file_.handle(), there) || !there.regular ||
            there.size > size || !detail::lock_file(file_.handle()))
            return false;
        // Whole, and it has another name, too: a crash has interrupted publish(). This one is left
        // over.
        std::error_code unknown;
        if (there.size == size && size > 0 &&
            std::filesystem::hard_link_count(path_, unknown) == 2) {
            std::filesystem::remove(path_, unknown);
            return false;
        }
        size_ = there.size;
        // At least one byte is always sent, so that its sender can say that it is the right one.
        if (size_ == size && size > 0) detail::truncate_file(file_.handle(), --size_);
        return true;
    }
    bool open_new() {
        file_ = detail::File(detail::open_part(path_, true));
        return file_.is_open() && detail::lock_file(file_.handle());
    }
    static FileError cannot_write(const std::filesystem::path& path) {
        bool full = detail::is_disk_full(errno);
        return {concat("Cannot write ", path.string(), ": ", system_reason(), "."),
                full ? "stopped: the disk there is full" : cannot_write_there};
    }
    static FileError too_many(const std::string& name, const std::filesystem::path& directory) {
        return {concat("There are too many files named ", name, " in ", directory.string(), "."),
                cannot_write_there};
    }

    detail::File file_{-1};
    std::filesystem::path path_;
    std::uint64_t size_ = 0;
    bool published_ = false;
};

// ---- Requests to the disk, and its answers ------------------------------------------------------

// How a worker sends: over the bulk lane to one login. (Chapter 12 has the real one.) The workers
// of several transfers share it.
class BulkLane {
  public:
    virtual ~BulkLane() = default;

    // The beginning of a message, to which the caller appends the body: a chunk is read from the
    // disk to where it will be sealed and sent from. `tag` comes back if it cannot be delivered.
    virtual Bytes begin(std::uint32_t tag, Kind kind) = 0;
    // Seals and queues it. Blocks while enough is queued. False if the connection is over.
    virtual bool finish(Bytes message) = 0;
};

// One attempt at a transfer, for the worker that carries it out.
struct FileAttempt {
    unsigned number = 0;  // never used again
    // At the sender:
    std::shared_ptr<const SourceFile> source{};
    std::shared_ptr<BulkLane> lane{};
    std::uint32_t tag = 0, id = 0;
    // At the receiver:
    std::filesystem::path directory{};
    std::string part_name{}, name{};
    std::uint64_t size = 0, modified = 0;
};
struct DiskRequest {
    enum class Task { hash, send, prepare, write, publish } task{};
    std::uint64_t offset = 0;  // send: from here; write: to here
    std::uint64_t size = 0;    // hash: of the first so many bytes; send: so many
    Bytes buffer{};            // write: these bytes, or those of them that are in
    ByteView bytes{};
};
struct DiskAnswer {
    unsigned attempt = 0;
    enum class What { ready, done, published, no_room, failed, ended } what{};
    std::uint64_t bytes = 0;  // ready: so many are there; done: so many more are sent or written
    std::uint64_t chunks = 0;
    Digest hash{};                  // ready: of what is there
    std::filesystem::path path{};   // ready, failed: the part, if it is there; published: the file
    std::string sentence{}, why{};  // failed: as in FileError
};

// The thread of one attempt: does what is asked of the disk, in its order.
class FileWorker {
  public:
    // `post` is called from the thread with each answer; the last one is `ended`. Throws
    // std::system_error if there is no thread for it.
    FileWorker(FileAttempt attempt, std::function<void(DiskAnswer)> post)
        : attempt_(std::move(attempt)), post_(std::move(post)), thread_([this] { run(); }) {}
    ~FileWorker() {
        stop(false);
        thread_.join();
    }
    FileWorker(const FileWorker&) = delete;
    FileWorker& operator=(const FileWorker&) = delete;

    // Does not block.
    void ask(DiskRequest request) {
        {
            std::lock_guard lock(mutex_);
            requests_.push_back(std::move(request));
        }
        changed_.notify_one();
    }
    // There will be no more requests. Those that wait are still done, if what came is to be kept as
    // far as possible; or dropped, so that they hold no memory while a disk hangs. Does not block.
    void stop(bool drop) noexcept {
        {
            std::lock_guard lock(mutex_);
            stopping_ = true;
            if (drop) requests_.clear();
        }
        changed_.notify_one();
    }

  private:
    using What = DiskAnswer::What;

    void run() noexcept {
        try {
            while (std::optional<DiskRequest> request = next()) execute(*request);
        } catch (const NoRoom& e) {
            post({.what = What::no_room, .sentence = e.what(), .why = e.why});
        } catch (const FileError& e) {
            post_failure(e.what(), e.why);
        } catch (const std::exception& e) {
            post_failure(e.what(), "stopped");
        }
        part_.reset();
        attempt_.lane.reset();
        post({.what = What::ended});
    }
    std::optional<DiskRequest> next() {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return stopping_ || !requests_.empty(); });
        if (requests_.empty()) return std::nullopt;
        DiskRequest request = std::move(requests_.front());
        requests_.pop_front();
        return request;
    }
    void execute(const DiskRequest& request) {
        switch (request.task) {
            case DiskRequest::Task::hash: {
                auto hash = attempt_.source->hash_of_beginning(request.size, stopping_);
                return post({.what = What::ready, .hash = hash.value_or(Digest{})});
            }
            case DiskRequest::Task::send:
                return send(request.offset, request.offset + request.size);
            case DiskRequest::Task::prepare:
                return prepare();
            case DiskRequest::Task::write:
                if (request.offset == 0 && part_->size() > 0) part_->clear();  // another file
                part_->append(request.bytes);
                return note_done(request.bytes.size());
            case DiskRequest::Task::publish:
                return post({.what = What::published,
                             .path = part_->publish(attempt_.name, attempt_.modified)});
        }
    }
    void send(std::uint64_t at, std::uint64_t end) {
        while (at < end && !stopping_) {
            auto size =
                static_cast<std::size_t>(std::min<std::uint64_t>(end - at, file_chunk_bytes));
            Bytes message = attempt_.lane->begin(attempt_.tag, FileChunk::kind);
            append_fields(message, attempt_.id, at, static_cast<std::uint32_t>(size));
            message.resize(message.size() + size);
            attempt_.source->read(at, ByteSpan(message).last(size));
            if (!attempt_.lane->finish(std::move(message))) return;  // the engine hears of it
            at += size;
            note_done(size);
        }
    }
    void prepare() {
        part_.emplace(attempt_.directory, attempt_.part_name, attempt_.size);
        std::uint64_t room = detail::free_space(attempt_.directory);
        if (room < attempt_.size - part_->size())
            throw NoRoom(concat("The disk of ", attempt_.directory.string(), " has room for ",
                                readable_size(room), ", and ", attempt_.name, " has ",
                                readable_size(attempt_.size), "."),
                         "stopped: the disk there is full");
        std::optional<Digest> hash = part_->hash(stopping_);
        if (stopping_) return;      // interrupted or cancelled meanwhile: what is there stays
        if (!hash) part_->clear();  // it cannot be read
        post({.what = What::ready,
              .bytes = part_->size(),
              .hash = hash ? *hash : sha256(),
              .path = part_->path()});
    }

    // What was sent or written is told when it is much, or all for now.
    void note_done(std::size_t bytes) {
        done_.bytes += bytes;
        ++done_.chunks;
        std::unique_lock lock(mutex_);
        bool tell = done_.bytes >= tell_every || requests_.empty();
        lock.unlock();
        if (tell) post(std::exchange(done_, {.what = What::done}));
    }
    void post_failure(const std::string& sentence, const std::string& why) {
        if (done_.bytes > 0) post(std::exchange(done_, {.what = What::done}));
        std::error_code failure;  // somebody may have tidied up
        bool there = part_ && part_->size() > 0 && std::filesystem::exists(part_->path(), failure);
        post({.what = What::failed,
              .path = there ? part_->path() : std::filesystem::path(),
              .sentence = sentence,
              .why = why});
    }
    void post(DiskAnswer answer) {
        answer.attempt = attempt_.number;
        post_(std::move(answer));
    }

    static constexpr std::uint64_t tell_every = 256 * 1024;
    FileAttempt attempt_;  // the thread's, like the next two
    std::optional<PartFile> part_;
    DiskAnswer done_{.what = What::done};  // and not told yet
    const std::function<void(DiskAnswer)> post_;
    std::atomic<bool> stopping_ = false;
    std::mutex mutex_;  // guards requests_
    std::condition_variable changed_;
    std::deque<DiskRequest> requests_;
    std::thread thread_;  // last: everything above exists when it starts; joined by ~FileWorker
};

// The workers of all transfers of a client. The engine's thread uses it.
class FileWorkers {
  public:
    // `wake` is called from any of the threads when there are answers to take.
    explicit FileWorkers(std::function<void()> wake) : wake_(std::move(wake)) {}

    // Throws std::system_error if there is no thread for it.
    void start(FileAttempt attempt) {
        unsigned number = attempt.number;
        workers_.try_emplace(number, std::move(attempt), [this](DiskAnswer answer) {
            {
                std::lock_guard lock(mutex_);
                answers_.push_back(std::move(answer));
            }
            wake_();
        });
    }
    void ask(unsigned attempt, DiskRequest request) {
        if (auto found = workers_.find(attempt); found != workers_.end())
            found->second.ask(std::move(request));
    }
    void stop(unsigned attempt, bool drop) {
        if (auto found = workers_.find(attempt); found != workers_.end()) found->second.stop(drop);
    }
    // The next answer, in the order in which each worker gave its own. Does not block.
    std::optional<DiskAnswer> take_answer() {
        std::unique_lock lock(mutex_);
        if (answers_.empty()) return std::nullopt;
        DiskAnswer answer = std::move(answers_.front());
        answers_.pop_front();
        lock.unlock();
        if (answer.what == DiskAnswer::What::ended) workers_.erase(answer.attempt);
        return answer;
    }

  private:
    const std::function<void()> wake_;
    std::mutex mutex_;  // guards answers_
    std::deque<DiskAnswer> answers_;
    std::map<unsigned, FileWorker> workers_;  // last: their threads use what is above
};

// ---- Credit -------------------------------------------------------------------------------------

// The receiver's account of one transfer.
struct CreditAccount {
    std::uint64_t granted = 0;   // what the sender may send, from the beginning of this attempt
    std::uint64_t consumed = 0;  // of that, what the disk has taken

    std::uint64_t outstanding() const { return granted - consumed; }

    // How much more to grant now; 0 if it is not worth a message yet. `active` transfers share
    // credit_total, and have `others` outstanding besides this one. Each can always have
    // credit_floor, so that a transfer whose disk hangs cannot keep the rest from all others.
    std::uint64_t due(std::uint64_t others, std::size_t active) const {
        constexpr std::uint64_t kept_free = (max_files_receiving - 1) * credit_floor;
        std::uint64_t free = credit_total - std::min(credit_total, others + kept_free);
        std::uint64_t window = std::max(credit_floor, std::min(credit_total / active, free));
        if (outstanding() >= window) return 0;
        std::uint64_t more = window - outstanding();
        return more >= window / 4 ? more : 0;
    }
};

// ---- Events: from the transfers to a front end (chapter 12) -------------------------------------
//
// Names and sentences contain what other people chose: a front end passes them through visible().

enum class FileState { queued, offered, preparing, moving, finishing, interrupted };

struct FileInfo {
    unsigned number = 0;  // ours, counting from 1: what /accept and /cancel take
    bool sending = false;
    std::string user;  // the other side
    std::string name;  // a safe one
    std::uint64_t size = 0;
};
struct FileEvent {
    enum class Phase {
        offered,      // by somebody: accept or decline
        offer_sent,   // to somebody
        queued,       // it will have its turn
        started,      // `done` bytes were there already
        progress,     // some times a second
        finished,     // received: `path` is where it is
        interrupted,  // it goes on by itself when the other side is back
        stopped,      // for good
    } phase{};
    FileInfo file;
    std::uint64_t done = 0;  // bytes from the file's beginning; finished: of the last attempt
    double bytes_per_second = 0;
    std::filesystem::path path{};
    std::string sentence{};  // interrupted, stopped: why
    bool failed = false;     // stopped: something that the user here wanted did not happen
};
struct FileStatus {
    FileInfo file;
    FileState state{};
    std::uint64_t done = 0;
};
struct FileList {
    std::vector<FileStatus> files;
};

// ---- The machine --------------------------------------------------------------------------------

// Somebody to whom files go or from whom they come.
struct FilePeer {
    LoginId id{};
    std::string user;
    Fingerprint identity;
};

// What the transfers need from the client. All of it is called in the engine's thread, and nothing
// of it blocks.
class FileHost {
  public:
    virtual void tell(FileEvent) = 0;
    // About what `user` has sent; if it is empty, about our own side.
    virtual void complain(const std::string& user, const std::string& sentence) = 0;
    // The login of a user to whom messages can be sealed now, if there is one.
    virtual std::optional<FilePeer> reach(const std::string& user) = 0;
    // Seals and queues a message, interactive. `tag` comes back if it cannot be delivered.
    virtual void send(LoginId to, std::uint32_t tag, Kind kind, ByteView body) = 0;
    virtual std::shared_ptr<BulkLane> bulk_lane(LoginId to) = 0;  // may be none
    // The disk: see FileWorkers.
    virtual void start(FileAttempt attempt) = 0;
    virtual void ask(unsigned attempt, DiskRequest request) = 0;
    virtual void stop(unsigned attempt, bool drop) = 0;

  protected:
    ~FileHost() = default;
};

// The table at the chapter's head. One thread uses it, and nothing in it waits.
class FileTransfers {
  public:
    struct Options {
        std::filesystem::path downloads;
        bool auto_accept = false;
        std::uint64_t max_size = UINT64_MAX;  // of what is accepted automatically
        Milliseconds patience{600'000};       // for an answer, and for somebody who left to return
    };

    // `host` must outlive this.
    FileTransfers(FileHost& host, Options options) : host_(host), options_(std::move(options)) {
        options_.downloads = std::filesystem::absolute(options_.downloads);
    }

    // Tags of Undelivered that are ours.
    static bool is_file_tag(std::uint32_t tag) { return (tag & file_tag) != 0; }

    // ---- Commands: all throw Error with a sentence for the user ---------------------------------

    void offer(const FilePeer& to, std::shared_ptr<const SourceFile> file) {
        if (transfers_.size() >= max_transfers)
            throw Error("Too many files are under way already: wait for some, or /cancel them.");
        Transfer& t = add({0, true, to.user, safe_file_name(file->name()), file->size()});
        t.peer = to;
        t.offered_name = file->name();
        t.source = std::move(file);
        settle();
        if (t.state == FileState::queued) tell(t, FileEvent::Phase::queued);
    }
    // `number` 0: the only one there is. `name`: another than the offered one, or empty.
    void accept(unsigned number, const std::string& name) {
        Transfer& t = waiting_offer(number);
        if (name.find_first_of("/\\") != name.npos)
            throw Error(concat("Give a name, without a folder: files are saved in ",
                               options_.downloads.string(), "."));
        if (!name.empty()) t.save_as = safe_file_name(name);
        t.accepted = true;
        peers_[t.peer.id].in_vain = 0;
        enter(t, FileState::queued);
        number = t.info.number;
        settle();  // there may be no thread for it: then it is forgotten
        auto found = transfers_.find(number);
        if (found != transfers_.end() && found->second.state == FileState::queued)
            tell(found->second, FileEvent::Phase::queued);
    }
    void decline(unsigned number) { end_by_user(waiting_offer(number), "declined"); }
    // Ends a transfer in any state, of either direction.
    void cancel(unsigned number) {
        if (number == 0 && transfers_.size() == 1) number = transfers_.begin()->first;
        auto found = transfers_.find(number);
        if (found == transfers_.end())
            throw Error(number == 0 ? "Which one? /files lists them." : no_such(number));
        Transfer& t = found->second;
        if (is_all_here(t)) throw Error("It is all here already.");
        end_by_user(t, "cancelled");
        settle();
    }
    FileList list() const {
        FileList list;
        for (const auto& [number, t] : transfers_)
            list.files.push_back({t.info, t.state, t.progress.done});
        return list;
    }
    // Whether something is under way that one would not want to cut off by leaving.
    bool is_busy() const {
        return std::any_of(transfers_.begin(), transfers_.end(),
                           [](const auto& entry) { return is_busy(entry.second); });
    }

    // Somebody waited for them, and waits no longer.
    void tell_unfinished() {
        for (const auto& [number, t] : transfers_)
            if (is_busy(t)) tell(t, FileEvent::Phase::stopped, "you left before it was done", true);
    }

    // ---- From the network -----------------------------------------------------------------------

    // A message of one of our kinds. What is wrong with it ends the transfer that it belongs to,
    // and nothing else.
    void receive(const FilePeer& from, OpenedPayload message) {
        constexpr std::string_view what = "a message about a file";
        ByteView body = message.body;
        try {
            switch (message.kind) {
                case Kind::file_offer:
                    receive_offer(from, decode<FileOffer>(body, what));
                    break;
                case Kind::file_accept:
                    receive_accept(from, decode<FileAccept>(body, what));
                    break;
                case Kind::file_credit:
                    receive_credit(from, decode<FileCredit>(body, what));
                    break;
                case Kind::file_chunk:
                    receive_chunk(from, decode<FileChunk>(body, what), std::move(message.buffer));
                    break;
                case Kind::file_over:
                    receive_over(from, decode<FileOver>(body, what));
                    break;
                default:
                    break;
            }
        } catch (const ProtocolError& e) {
            host_.complain(from.user, concat("A message about a file from ", from.user,
                                             " is out of order, and was ignored. ", e.what()));
        }
        settle();
    }
    // There was no room in the receiver's queue for what we sent with this tag.
    void came_back(std::uint32_t tag) {
        auto found = transfers_.find(tag & ~file_tag);
        if (found == transfers_.end()) return;
        if (found->second.id == 0 || is_all_here(found->second)) return;
        end(found->second, lost,
            concat(found->second.info.user, " cannot keep up at the moment",
                   found->second.info.sending ? ". Offered again later, it goes on where it stopped"
                                              : ""));
        settle();
    }
    void peer_left(LoginId id, const std::string& user) {
        interrupt(id, concat(user, " left"));
        peers_.erase(id);
        settle();
    }
    void connection_lost() {
        interrupt(std::nullopt, "the connection was lost");
        peers_.clear();
    }
    // Somebody is here, and has shown a card that is trusted.
    void peer_is_back() { settle(); }

    // ---- From the disk, and from time to time ---------------------------------------------------

    void answered(const DiskAnswer& answer) {
        if (answer.what == DiskAnswer::What::ended) ending_.erase(answer.attempt);
        for (auto& [number, t] : transfers_)
            if (t.attempt == answer.attempt && may_come(t.state, answer.what)) {
                t.info.sending ? answered_sender(t, answer) : answered_receiver(t, answer);
                break;
            }
        settle();
    }
    void tick(Clock::time_point now) {
        for (auto it = transfers_.begin(); it != transfers_.end();) {
            Transfer& t = (it++)->second;  // it may be forgotten
            if (now >= stands_still(t)) {  // no rate that is not true any more
                t.progress.bytes_per_second = 0;
                t.progress.told = now;
                t.progress.told_done = t.progress.done;
                tell(t, FileEvent::Phase::progress);
            }
            if (now < deadline(t)) continue;
            std::string_view user = t.info.user;
            if (t.state == FileState::offered)
                end(t, "withdrew it, because nobody answered", concat(user, " did not answer"));
            else if (t.state == FileState::interrupted)
                end(t, "", concat(user, " did not come back"));
            else
                end(t, "stopped: nothing has moved for a long time",
                    concat("stopped: nothing has moved for a long time",
                           t.info.sending ? ". Offered again, it goes on where it was" : ""));
        }
        settle();
    }
    // When tick() has something to do.
    Clock::time_point next_deadline() const {
        Clock::time_point next = Clock::time_point::max();
        for (const auto& [number, t] : transfers_)
            next = std::min({next, deadline(t), stands_still(t)});
        return next;
    }

  private:
    static constexpr std::uint32_t file_tag = 0x8000'0000;
    static constexpr std::size_t max_transfers = 1000;      // that we asked for ourselves
    static constexpr std::size_t max_offers = 64;           // of others, that nobody has answered
    static constexpr std::size_t max_with_one = 16;         // of one person, in each direction
    static constexpr std::size_t max_receiving_of_one = 8;  // so that nobody takes all the places
    static constexpr unsigned max_in_vain = 5;  // each is two lines on somebody's screen
    // The credit bounds the bytes that wait for the disk; this, what each chunk costs besides.
    static constexpr std::uint64_t max_waiting_chunks = credit_total / 1024;
    static constexpr std::uint64_t slow_disk = 10'000'000;  // bytes in a second, when it hashes
    static constexpr Milliseconds progress_every{250};
    static constexpr const char* lost = "missed a part of it";

    struct Progress {
        std::uint64_t done = 0;
        double bytes_per_second = 0;
        std::uint64_t told_done = 0;
        Clock::time_point told{}, moved{};  // moved: when `done`, or the state, last changed
    };
    struct Transfer {
        FileInfo info;
        FileState state = FileState::queued;
        FilePeer peer;                             // whose id is 0 while out of reach
        std::uint32_t id = 0;                      // of the offer, on the wire; 0: not yet
        unsigned attempt = 0;                      // of the worker, 0 if there is none
        bool accepted = false;                     // now or in an earlier attempt
        std::string offered_name;                  // as it is called at the sender
        std::shared_ptr<const SourceFile> source;  // sending
        std::uint64_t modified = 0;                // receiving, like the next two
        std::string save_as;
        std::filesystem::path part;
        Digest held{};                     // sending: the hash of what they say they have
        bool begun = false;                // a chunk has moved in this attempt
        std::uint64_t first = 0;           // where this attempt began
        std::uint64_t next = 0;            // offset of the next chunk: to ask for, or to come
        CreditAccount credit;              // sending: consumed is what was sent
        std::uint64_t chunks_waiting = 0;  // for the disk
        Progress progress;
    };
    struct PeerState {
        std::uint32_t last_offer = 0;  // the largest id that came
        unsigned refused = 0;          // offers that were too many
        unsigned in_vain = 0;  // offers that they took back before we could answer, in a row
    };

    // ---- Finding --------------------------------------------------------------------------------

    static std::string no_such(unsigned number) {
        return concat("There is no file number ", number, ". /files lists them.");
    }
    Transfer& waiting_offer(unsigned number) {
        std::vector<Transfer*> waiting;
        for (auto& [n, t] : transfers_)
            if (!t.info.sending && t.state == FileState::offered && (number == 0 || n == number))
                waiting.push_back(&t);
        if (waiting.size() == 1) return *waiting[0];
        if (waiting.size() > 1) throw Error("Several offers wait: which one? /files lists them.");
        if (number == 0) throw Error("There is no offer that waits for an answer.");
        auto found = transfers_.find(number);
        if (found == transfers_.end() || found->second.info.sending) throw Error(no_such(number));
        throw Error("That one is accepted already.");
    }
    // The transfer that a message means. Null for one that is over: its messages may still be on
    // the way. Throws ProtocolError for one that never was.
    Transfer* find(const FilePeer& peer, bool sending, std::uint32_t id) {
        for (auto& [number, t] : transfers_)
            if (id != 0 && t.info.sending == sending && t.peer.id == peer.id && t.id == id)
                return &t;
        if (id == 0 || id > (sending ? last_offer_ : peers_[peer.id].last_offer))
            throw ProtocolError("It is about a file that was never offered.");
        return nullptr;
    }
    template <class Condition>
    std::size_t count(const Condition& condition) const {
        return static_cast<std::size_t>(
            std::count_if(transfers_.begin(), transfers_.end(),
                          [&](const auto& entry) { return condition(entry.second); }));
    }
    static bool is_busy(const Transfer& t) {
        return t.info.sending ||
               (t.state != FileState::offered && t.state != FileState::interrupted);
    }
    static bool is_running(const Transfer& t) {
        return t.state == FileState::preparing || t.state == FileState::moving ||
               t.state == FileState::finishing;
    }
    static bool is_all_here(const Transfer& t) {
        return !t.info.sending && t.state == FileState::finishing;
    }
    std::size_t receiving() const {
        return count([](const Transfer& t) { return !t.info.sending && is_running(t); });
    }
    // Whether the disk can answer so. What cannot happen is ignored.
    static bool may_come(FileState state, DiskAnswer::What what) {
        switch (what) {
            case DiskAnswer::What::ready:
            case DiskAnswer::What::no_room:
                return state == FileState::preparing;
            case DiskAnswer::What::done:
                return state == FileState::moving || state == FileState::finishing;
            case DiskAnswer::What::published:
                return state == FileState::finishing;
            case DiskAnswer::What::failed:
                return true;
            case DiskAnswer::What::ended:
                break;
        }
        return false;
    }
    // What a part is called, without its ending.
    static std::string part_name(const Transfer& t) {
        Bytes key = to_bytes(as_bytes("chatsecure part 1"));
        append_fields(key, t.peer.identity.digest, t.offered_name, t.info.size);
        return concat(t.info.name, ".", to_hex(ByteView(sha256(key)).first(4)));
    }

    // ---- Changing -------------------------------------------------------------------------------

    Transfer& add(FileInfo info) {
        info.number = ++last_number_;
        Transfer& t = transfers_[info.number];
        t.info = std::move(info);
        t.peer.user = t.info.user;
        enter(t, FileState::queued);
        return t;
    }
    void enter(Transfer& t, FileState state) {
        t.state = state;
        t.progress.moved = Clock::now();
    }
    // Gives the queued ones what places there are, in their order.
    void settle() {
        for (auto it = transfers_.begin(); it != transfers_.end();) {
            Transfer& t = (it++)->second;  // it may be forgotten
            bool waits = t.state == FileState::queued ||
                         (t.info.sending && t.state == FileState::interrupted);
            if (waits && t.info.sending)
                send_offer(t);
            else if (t.state == FileState::queued)
                prepare(t);
            else if (t.state == FileState::offered && !t.info.sending && options_.auto_accept)
                accept_or_refuse(t);
        }
    }
    bool start(Transfer& t, FileAttempt attempt) {
        attempt.number = ++last_attempt_;
        try {
            host_.start(attempt);
        } catch (const std::system_error& e) {
            end(t, "stopped", concat("no thread for it: ", e.what()));
            return false;
        }
        t.attempt = attempt.number;
        t.begun = false;
        t.credit = {};
        t.chunks_waiting = 0;
        enter(t, FileState::preparing);
        return true;
    }
    // Its worker ends in its own time; until then its part is not touched by another one.
    void release_worker(Transfer& t, bool drop) {
        if (t.attempt == 0) return;
        host_.stop(t.attempt, drop);
        ending_.emplace(std::exchange(t.attempt, 0), t.info.sending ? "" : part_name(t));
    }
    Clock::time_point deadline(const Transfer& t) const {
        using enum FileState;
        bool never = t.state == queued || t.state == preparing ||
                     (!t.info.sending && (t.state == offered || t.state == finishing)) ||
                     (!t.info.sending && t.state == moving && t.credit.granted == t.next - t.first);
        if (never) return Clock::time_point::max();
        // Before the first chunk, the other side may have to hash what is there: we know how much
        // that is when it has been accepted, and until then that it is not more than the file.
        std::uint64_t held = t.state == offered ? t.info.size : t.begun ? 0 : t.first;
        auto hashing = std::chrono::seconds(held / slow_disk);
        return t.progress.moved + options_.patience + hashing;
    }

    // When it is told that nothing moves.
    static Clock::time_point stands_still(const Transfer& t) {
        bool told_otherwise = t.state == FileState::moving && t.progress.bytes_per_second > 0;
        return told_otherwise ? t.progress.told + std::chrono::seconds(2)
                              : Clock::time_point::max();
    }

    // ---- Telling --------------------------------------------------------------------------------

    template <class T>
    void send(const Transfer& t, const T& message) {
        if (t.peer.id != LoginId{} && t.id != 0)
            host_.send(t.peer.id, file_tag | t.info.number, T::kind, encode(message));
    }
    void tell(const Transfer& t, FileEvent::Phase phase, const std::string& sentence = "",
              bool failed = false) {
        host_.tell({.phase = phase,
                    .file = t.info,
                    .done = t.progress.done,
                    .bytes_per_second = t.progress.bytes_per_second,
                    .sentence = sentence,
                    .failed = failed});
    }
    void tell_begin(Transfer& t, std::uint64_t offset) {
        if (std::exchange(t.begun, true)) return;
        Clock::time_point now = Clock::now();
        t.progress = {offset, 0, offset, now, now};
        tell(t, FileEvent::Phase::started);
    }
    void tell_progress(Transfer& t, std::uint64_t more) {
        Progress& p = t.progress;
        Clock::time_point now = Clock::now();
        p.done += more;
        p.moved = now;
        std::chrono::duration<double> passed = now - p.told;
        if (passed < progress_every) return;
        double rate = static_cast<double>(p.done - p.told_done) / passed.count();
        p.bytes_per_second = p.bytes_per_second == 0 ? rate : 0.8 * p.bytes_per_second + 0.2 * rate;
        p.told = now;
        p.told_done = p.done;
        tell(t, FileEvent::Phase::progress);
    }

    // ---- The end of a transfer ------------------------------------------------------------------

    // Tells the other side why (if it is in reach), and our user a sentence; forgets it.
    void end(Transfer& t, std::string_view why, const std::string& sentence) {
        bool wanted = t.info.sending || t.state != FileState::offered;
        finish(t, why, sentence, wanted);
    }
    void end_by_user(Transfer& t, std::string_view what) {
        finish(t, concat(what, " it"), concat("you ", what, " it"), false);
    }
    // The other side has sent what it must not send.
    void break_off(Transfer& t, std::string_view fault) {
        end(t, "stopped, because of a message from here that was out of order",
            concat("stopped, because ", t.info.user, "'s client ", fault));
    }
    void finish(Transfer& t, std::string_view why, const std::string& sentence, bool failed) {
        if (!why.empty()) send(t, FileOver{t.id, t.info.sending, std::string(why)});
        tell(t, FileEvent::Phase::stopped, sentence + kept(t, sentence), failed);
        forget(t);
    }
    void forget(Transfer& t) {
        release_worker(t, true);
        transfers_.erase(t.info.number);
    }
    // What became of what has come, so that nothing large stays on a disk in silence.
    static std::string kept(const Transfer& t, std::string_view sentence) {
        if (t.info.sending || t.part.empty() || (t.progress.done == 0 && !t.begun)) return "";
        bool after_a_stop = sentence.ends_with('.');
        return concat(after_a_stop ? " What" : "; what", " has come is kept in ", t.part.string(),
                      ", and goes on there when it is offered again", after_a_stop ? "." : "");
    }

    // Somebody (or everybody: no id) is out of reach.
    void interrupt(std::optional<LoginId> who, const std::string& reason) {
        for (auto it = transfers_.begin(); it != transfers_.end();) {
            Transfer& t = (it++)->second;
            if (t.peer.id == LoginId{} || (who && t.peer.id != *who)) continue;
            t.peer.id = {};
            t.id = 0;
            if (is_all_here(t)) continue;
            if (!t.accepted && t.state != FileState::queued) {
                end(t, "",
                    concat(reason,
                           t.info.sending ? " before it was accepted" : ": the offer is gone"));
                continue;
            }
            release_worker(t, false);
            enter(t, FileState::interrupted);
            tell(t, FileEvent::Phase::interrupted,
                 concat("interrupted: ", reason,
                        t.info.sending ? "; it goes on when "
                                       : "; what has come is kept, and it goes on when ",
                        t.info.user, t.info.sending ? " is back" : " offers it again"));
        }
    }

    // ---- The sender's side ----------------------------------------------------------------------

    // If the turn of this one has come, and the other one is in reach.
    void send_offer(Transfer& t) {
        std::size_t before = count([&](const Transfer& other) {
            return other.info.sending && other.info.user == t.info.user &&
                   (other.state == FileState::offered || is_running(other));
        });
        std::optional<FilePeer> peer = host_.reach(t.info.user);
        if (!peer) return;
        t.peer = *peer;
        if (t.state == FileState::interrupted) enter(t, FileState::queued);
        if (before >= max_with_one) return;
        bool first = !t.accepted;
        t.id = ++last_offer_;
        enter(t, FileState::offered);
        send(t, FileOffer{t.id, t.offered_name, t.info.size, t.source->modified()});
        if (first) tell(t, FileEvent::Phase::offer_sent);
    }
    void receive_accept(const FilePeer& from, const FileAccept& accepted) {
        Transfer* t = find(from, true, accepted.id);
        if (t == nullptr) return;
        if (t->state != FileState::offered) return break_off(*t, "accepted it twice");
        if (accepted.offset > t->info.size || accepted.credit > credit_total ||
            (accepted.offset == t->info.size && t->info.size > 0))
            return break_off(*t, "accepted more than there is");
        std::shared_ptr<BulkLane> lane = host_.bulk_lane(from.id);
        if (!lane || !start(*t, {.source = t->source,
                                 .lane = std::move(lane),
                                 .tag = file_tag | t->info.number,
                                 .id = t->id}))
            return;
        t->accepted = true;
        t->first = t->next = accepted.offset;
        t->held = accepted.held;
        t->credit.granted = accepted.credit;
        host_.ask(t->attempt, {.task = DiskRequest::Task::hash, .size = accepted.offset});
    }
    void receive_credit(const FilePeer& from, const FileCredit& credit) {
        Transfer* t = find(from, true, credit.id);
        if (t == nullptr || t->state == FileState::finishing) return;
        if (t->state != FileState::preparing && t->state != FileState::moving)
            return break_off(*t, "gave credit without accepting it");
        if (credit.credit <= t->credit.granted) return break_off(*t, "took credit back");
        if (credit.credit > t->next - t->first + credit_total)
            return break_off(*t, "gave more credit than there is");
        t->credit.granted = credit.credit;
        if (t->state == FileState::moving) send_more(*t);
    }
    void send_more(Transfer& t) {
        std::uint64_t asked = t.next - t.first;
        std::uint64_t size = std::min(t.credit.granted - asked, t.info.size - t.next);
        if (size > 0)
            host_.ask(t.attempt, {.task = DiskRequest::Task::send, .offset = t.next, .size = size});
        t.next += size;
    }
    void answered_sender(Transfer& t, const DiskAnswer& answer) {
        using What = DiskAnswer::What;
        if (answer.what == What::failed) return end(t, answer.why, answer.sentence);
        if (answer.what == What::ready) {
            if (answer.hash != t.held) t.first = 0;  // it is not the beginning of this file
            t.next = t.first;
            enter(t, FileState::moving);
            tell_begin(t, t.first);
            send_more(t);
        } else if (answer.what == What::done) {
            t.credit.consumed += answer.bytes;
            tell_progress(t, answer.bytes);
        } else {
            return;
        }
        if (t.credit.consumed == t.info.size - t.first) enter(t, FileState::finishing);
    }
    void receive_over(const FilePeer& from, const FileOver& over) {
        bool sending = over.by_sender == 0;
        Transfer* t = find(from, sending, over.id);
        if (t == nullptr || is_all_here(*t)) return;
        if (sending && over.why.empty()) return stored(*t);
        if (!sending && t->state == FileState::offered) ++peers_[from.id].in_vain;
        end(*t, "",
            concat(t->info.user, " ",
                   over.why.empty() ? "stopped it" : over.why.substr(0, max_why_bytes)));
    }
    // The answer may be here before our own worker has said that all was sent.
    void stored(Transfer& t) {
        bool all = t.next == t.info.size &&
                   (t.state == FileState::moving || t.state == FileState::finishing);
        if (!all && !(t.state == FileState::preparing && t.info.size == 0))
            return break_off(t, "says that it has it, before all of it was sent");
        tell_begin(t, t.first);
        tell_finished(t, {});
    }
    void tell_finished(Transfer& t, const std::filesystem::path& path) {
        host_.tell({.phase = FileEvent::Phase::finished,
                    .file = t.info,
                    .done = t.info.size - t.first,
                    .path = path});
        forget(t);
    }

    // ---- The receiver's side --------------------------------------------------------------------

    void receive_offer(const FilePeer& from, const FileOffer& offer) {
        PeerState& peer = peers_[from.id];
        if (offer.id <= peer.last_offer) throw ProtocolError("Its number is not a new one.");
        peer.last_offer = offer.id;
        for (auto& [number, t] : transfers_)  // accepted before, and interrupted
            if (!t.info.sending && t.state == FileState::interrupted &&
                t.peer.identity == from.identity && t.offered_name == offer.name &&
                t.info.size == offer.size && t.modified == offer.modified) {
                t.peer = from;
                t.id = offer.id;
                return enter(t, FileState::queued);
            }
        auto of_this_one = [&](bool interrupted) {
            return count([&](const Transfer& t) {
                return !t.info.sending && t.info.user == from.user &&
                       (t.state == FileState::interrupted) == interrupted;
            });
        };
        std::size_t unanswered = count(
            [](const Transfer& t) { return !t.info.sending && t.state == FileState::offered; });
        if (of_this_one(false) >= max_with_one || of_this_one(true) >= max_offers ||
            unanswered >= max_offers || peer.in_vain > max_in_vain) {
            // Not for ever: whoever makes us answer uses up our own right to talk (chapter 11).
            if (++peer.refused <= max_offers)
                host_.send(from.id, file_tag, FileOver::kind,
                           encode(FileOver{offer.id, 0, "takes no more files at the moment"}));
            return;
        }
        Transfer& t = add({0, false, from.user, safe_file_name(offer.name), offer.size});
        enter(t, FileState::offered);
        t.peer = from;
        t.id = offer.id;
        t.offered_name = offer.name;
        t.modified = offer.modified;
        t.save_as = t.info.name;
        tell(t, FileEvent::Phase::offered);
    }
    // For those who accept automatically: nobody is there to decide otherwise.
    void accept_or_refuse(Transfer& t) {
        if (t.info.size > options_.max_size)
            return end(t, "takes no file of this size",
                       concat("declined: it is larger than ", readable_size(options_.max_size)));
        t.accepted = true;
        enter(t, FileState::queued);
        prepare(t);
    }
    // If there is a place for it.
    void prepare(Transfer& t) {
        std::size_t of_this_one = count([&](const Transfer& other) {
            return !other.info.sending && is_running(other) && other.info.user == t.info.user;
        });
        std::size_t still_ending = 0;
        for (const auto& [attempt, part] : ending_) {
            if (part == part_name(t)) return;  // until then it writes
            if (!part.empty()) ++still_ending;
        }
        if (receiving() + still_ending >= max_files_receiving ||
            of_this_one >= max_receiving_of_one)
            return;
        if (start(t, {.directory = options_.downloads,
                      .part_name = part_name(t),
                      .name = t.save_as,
                      .size = t.info.size,
                      .modified = t.modified}))
            host_.ask(t.attempt, {.task = DiskRequest::Task::prepare});
    }
    void answered_receiver(Transfer& t, const DiskAnswer& answer) {
        using What = DiskAnswer::What;
        switch (answer.what) {
            case What::ready:
                t.part = answer.path;
                t.first = t.next = t.progress.done = answer.bytes;
                enter(t, FileState::moving);
                t.credit.granted = credit_due(t);
                send(t, FileAccept{t.id, t.first, answer.hash, t.credit.granted});
                return publish_if_whole(t);
            case What::done:
                t.credit.consumed += answer.bytes;
                t.chunks_waiting -= answer.chunks;
                tell_progress(t, answer.bytes);
                return grant(t);
            case What::published:
                send(t, FileOver{t.id, 0, ""});
                return tell_finished(t, answer.path);
            case What::no_room:
                if (options_.auto_accept) return end(t, answer.why, answer.sentence);
                host_.complain("", concat(answer.sentence, " The offer still stands."));
                release_worker(t, true);
                t.accepted = false;
                return enter(t, FileState::offered);
            case What::failed:
                t.part = answer.path;
                return end(t, answer.why, answer.sentence);
            case What::ended:
                return;
        }
    }
    void receive_chunk(const FilePeer& from, const FileChunk& chunk, Bytes buffer) {
        Transfer* t = find(from, false, chunk.id);
        if (t == nullptr || is_all_here(*t)) return;
        if (t->state != FileState::moving)
            return break_off(*t, "sent some of it before it was accepted");
        if (!t->begun && chunk.offset == 0) t->first = t->next = 0;  // it begins anew
        if (chunk.offset > t->next) return end(*t, lost, "a part of it was lost on the way");
        if (chunk.offset < t->next) return break_off(*t, "sent a part of it twice");
        if (chunk.bytes.empty()) return break_off(*t, "sent an empty part of it");
        if (chunk.bytes.size() > t->info.size - t->next)
            return break_off(*t, "sent more than was offered");
        if (chunk.bytes.size() > t->credit.granted - (t->next - t->first))
            return break_off(*t, "sent more than it had credit for");
        if (++t->chunks_waiting > max_waiting_chunks)
            return break_off(*t, "sent it in crumbs, faster than they can be written");
        tell_begin(*t, t->next);
        t->next += chunk.bytes.size();
        host_.ask(t->attempt, {.task = DiskRequest::Task::write,
                               .offset = chunk.offset,
                               .buffer = std::move(buffer),
                               .bytes = chunk.bytes});
        publish_if_whole(*t);
    }
    void publish_if_whole(Transfer& t) {
        if (t.next != t.info.size) return;
        tell_begin(t, t.next);
        enter(t, FileState::finishing);
        host_.ask(t.attempt, {.task = DiskRequest::Task::publish});
    }
    void grant(Transfer& t) {
        std::uint64_t needed = t.info.size - t.first;  // in this attempt
        std::uint64_t more = t.credit.granted < needed ? credit_due(t) : 0;
        if (t.state != FileState::moving || more == 0) return;
        t.credit.granted += more;
        send(t, FileCredit{t.id, t.credit.granted});
    }
    std::uint64_t credit_due(const Transfer& t) const {
        std::uint64_t others = 0;
        for (const auto& [number, other] : transfers_)
            if (!other.info.sending && is_running(other) && &other != &t)
                others += other.credit.outstanding();
        return t.credit.due(others, std::max<std::size_t>(1, receiving()));
    }

    FileHost& host_;
    Options options_;
    unsigned last_number_ = 0, last_attempt_ = 0;
    std::uint32_t last_offer_ = 0;
    std::map<unsigned, Transfer> transfers_;
    std::map<unsigned, std::string> ending_;  // attempts whose workers still run, and their parts
    std::map<LoginId, PeerState> peers_;
};

// ---- Try it -------------------------------------------------------------------------------------
//
// Break: endless-credit (whoever sends a file decides how much of it waits here) and
// moves-without-consent (files are taken without asking).
//
// Write a SLOW receiver: whoever has a line to share wants no file to take more than some bytes per
// second of it. Only the receiver's credit decides, so this is one more function beside due():
//
//      std::uint64_t paced_credit(const CreditAccount& account, std::uint64_t bytes_per_second,
//                                 Milliseconds since_start)
//
// gives how much more to grant now. As much as may be: granted stays within credit_floor + the rate
// times the time, and outstanding within credit_total. But 0 where that is less than a quarter of
// credit_floor: a message for a few bytes is silly.
// Green: exercise: slow

// =================================================================================================
//  Chapter 10. Connections
// =================================================================================================
//
// Chapters 2 to 7 gave us sockets, frames, records and messages. This one puts them together into
// the object that server and client both hold for each conversation, and answers the question that
// decides how fast a chat server is: who writes to a socket, and when?
//
//      many threads --> push() --> [ outbox ] --> flush() --> seal --> send() --> one thread reads
//
// Alice's thread has something for bob. If it wrote to bob's socket itself, it would wait when bob
// is slow, and everybody behind alice with it. If it left the writing to a thread of bob's own,
// each message would have to wake that thread, and a message for a thousand people would wake a
// thousand threads, one for each small message. So it does neither:
//
//   - push() appends the message to bob's OUTBOX and never waits.
//   - When alice's thread has handled all that has come from alice so far, and before it waits for
//     more, it calls flush() for each outbox that it has put something into: seals what is there
//     and sends it, as far as the socket takes it at once. Fifty messages that came in one go leave
//     in one record, with one encryption and one system call for each member.
//   - If bob's socket is full, the rest stays in the outbox, and somebody who can afford to wait
//     (the server's pump, the client's engine: see on_full) goes on when poll() says that there is
//     room. Nobody else waits for bob.
//
// So for each outbox there is at any time at most one who writes, and if something is in it there
// is exactly one who is going to. The outbox keeps book of that:
//
//      who empties it   push()                flush()            the socket is full   all is sent
//      ---------------  --------------------  -----------------  -------------------  -----------
//      nobody           -> due: the caller's  nothing to do
//                          duty to flush()
//      due              stays: somebody will  -> writing
//      writing          stays: who writes     leaves it to who   -> full              -> nobody
//                       looks again           writes
//      full             stays                 leaves it; who
//                                             polls: -> writing
//
// If the socket breaks, who was writing closes the outbox and shuts the connection down; nobody
// writes any more, and the owner finds the end when it reads.
//
// What lies in an outbox is the plaintext of the records to come, in the order in which they will
// be sent; the numbers of chapter 5 are given when a frame is sealed, at the last moment:
//
//      interactive   [ room for | message | message | ... ]  [ room for | message | ... ]
//      bulk          [ a header | message | ...           ]    up to 64 KiB of messages each
//                        |
//                        +--> sealed in place: length || ciphertext || tag
//
// Of a room message all members get the same bytes but the last 57, their wrapped key; it comes to
// push() in these two pieces, so that the server encodes the large one once.
//
// An outbox has two LANES. Chat goes in the interactive one, file data in the bulk one, and bulk
// gets a turn only when the interactive lane is empty: in one queue a word would wait behind
// megabytes ("head-of-line blocking"). And it has bounds, because a member that reads too slowly
// must not fill our memory:
//
//      a payload           over the bound of its lane is refused, and its sender is told
//                          (Undelivered: busy). File data never takes chat's place; before file
//                          data is refused, the server lets its sender wait for a moment
//      a control message   (Joined, Left, Pong ...) may go over the bound, because a client that
//                          misses one would be wrong about the world for ever; but if it goes to
//                          twice the bound, the connection is given up
//
// SENT is not DELIVERED. That push() says `queued` means that the bytes are in our memory; that
// send() took them, that they are in the kernel's. TCP acknowledges to the kernel, not to us, and
// what it acknowledged may still lie unread on the other side. When a connection breaks, both sides
// lose what was on its way, and neither can know how much that was. No queue can mend this, however
// careful it is, and this one does not try: it says only what it knows, and the two ends settle the
// rest. The server says Taken for a room message when it stands in the outboxes of all members whom
// it names and has been flushed; Taken is queued behind that, so the order of one thread's work
// carries its meaning. Readers say receipts (chapter 8), which are payloads like any others here.
// Who hears neither sends again under the same id, or names what may be lost.
//
// The end. A connection ends in one of two ways. finish(): nothing more can be queued, what is
// queued is still sent, then our stream ends; so a Goodbye is heard. abort(): at once, and what was
// queued is thrown away; for those who are not there any more.
//
// Silence. A machine that loses its power says no goodbye: without a question its connection looks
// alive for ever. Who says nothing for a while is sent a Ping; who then says nothing for as long
// again is gone (TimedOut). Both sides do it, each in its own time. Anything that comes counts, not
// the Pong alone, which may stand behind megabytes.
//
// What all this does not protect against: a member who keeps another's outbox full (chapter 11
// reads more slowly from whoever writes too much); the kernel's own buffers, in which nothing
// overtakes anything any more (set_chat_options keeps them short); and the loss of what was queued
// when either process ends.
//
// Locks. One mutex for each outbox, held for as long as it takes to append or take out a message. A
// file's thread sleeps on it until its lane has room; while somebody has it, nobody waits and
// nothing else is locked.

// The frames that wait to be sent on one connection. Any thread.
class Outbox {
  public:
    // due: queued, and nobody is going to send it yet: call Connection::flush() before you wait for
    // anything. queued: somebody will. refused: over the bound. closed: over altogether.
    enum class Result { due, queued, refused, closed };

    // The bounds in bytes, of the interactive and of the bulk lane.
    Outbox(std::size_t bound, std::size_t bulk_bound) : bounds_{bound, bulk_bound} {}

    // For payloads: a message, or the pieces of its bytes (what all recipients share, and what is
    // the recipient's own). Does not block. Throws Error for what fits into no record.
    template <class... Part>
    Result push(Lane lane, const Part&... part) {
        return put(lane, bounds_[index_of(lane)], part...);
    }
    // For control messages: one, or the bytes of several that fit into one record. Does not block.
    // Over twice the bound, the outbox closes itself.
    template <class Part>
    Result push_control(const Part& part) {
        Result result = put(Lane::interactive, 2 * bounds_[0], part);
        if (result == Result::refused) close();
        return result;
    }
    // A whole frame for the bulk lane: room for the header, then messages.
    Result push_frame(Bytes frame) {
        std::lock_guard lock(mutex_);
        if (state_ != State::open) return Result::closed;
        std::size_t added = frame.size() - frame_header_bytes;
        if (bytes_[1] + added > bounds_[1]) return Result::refused;
        bytes_[1] += added;
        lanes_[1].push_back(std::move(frame));
        return note_queued();
    }

    // Nothing more can be queued; what is there is still sent.
    void finish() { end(State::finishing); }
    // Nothing more can be queued or sent.
    void close() { end(State::closed); }
    bool is_closed() const {
        std::lock_guard lock(mutex_);
        return state_ == State::closed;
    }

    // Whether more than `bytes` of chat wait.
    bool is_over(std::size_t bytes) const {
        std::lock_guard lock(mutex_);
        return bytes_[0] > bytes;
    }
    // For whoever can wait, as the reader of a file can: blocks while more than `bytes` stand in
    // the bulk lane, at most until `deadline`. False if the outbox takes nothing more.
    bool wait_for_bulk_room(std::size_t bytes,
                            Clock::time_point deadline = Clock::time_point::max()) {
        std::unique_lock lock(mutex_);
        auto ready = [&] { return bytes_[1] <= bytes || state_ != State::open; };
        if (deadline == Clock::time_point::max())  // which wait_until cannot count to
            bulk_taken_.wait(lock, ready);
        else
            bulk_taken_.wait_until(lock, deadline, ready);
        return state_ == State::open;
    }

    // ---- For who writes: see the table above ----------------------------------------------------

    enum class Writer { nobody, due, writing, full };

    // True if the caller is to write now: from `from` to writing.
    bool start_writing(Writer from) {
        std::lock_guard lock(mutex_);
        if (writer_ != from) return false;
        writer_ = Writer::writing;
        return true;
    }
    void stop_at_full_socket() {
        std::lock_guard lock(mutex_);
        writer_ = Writer::full;
    }
    bool is_full() const {
        std::lock_guard lock(mutex_);
        return writer_ == Writer::full;
    }
    // Whether something waits, or is just being sent.
    bool is_being_emptied() const {
        std::lock_guard lock(mutex_);
        return writer_ != Writer::nobody && state_ != State::closed;
    }
    enum class State { open, finishing, closed };
    // The next frame to seal and send: chat first. Nothing: all is sent, or it is closed (`state`
    // says so), and the caller is not writing any more.
    std::optional<Bytes> take(State& state) {
        std::lock_guard lock(mutex_);
        for (Lane lane : {Lane::interactive, Lane::bulk}) {
            std::deque<Bytes>& frames = lanes_[index_of(lane)];
            if (frames.empty() || state_ == State::closed) continue;
            Bytes frame = std::move(frames.front());
            frames.pop_front();
            bytes_[index_of(lane)] -= frame.size() - frame_header_bytes;
            if (lane == Lane::bulk) bulk_taken_.notify_all();
            return frame;
        }
        writer_ = Writer::nobody;
        state = state_;
        return std::nullopt;
    }

  private:
    static constexpr std::size_t smallest_allocation = 512;

    // Appends to the last frame of a lane, or begins a new one if the record would be too large.
    template <class... Part>
    Result put(Lane lane, std::size_t bound, const Part&... part) {
        std::lock_guard lock(mutex_);
        if (state_ != State::open) return Result::closed;
        std::deque<Bytes>& frames = lanes_[index_of(lane)];
        if (frames.empty()) frames.push_back(new_frame());
        std::size_t before = frames.back().size();
        bool queued = false;
        detail::AtExit undo([&] {
            if (queued) return;
            frames.back().resize(before);
            if (before == frame_header_bytes) frames.pop_back();
        });
        (add(frames.back(), part), ...);
        std::size_t added = frames.back().size() - before;
        if (added > max_record_bytes) throw Error("A message must fit into a record.");
        if (bytes_[index_of(lane)] + added > bound) return Result::refused;
        if (before + added > frame_header_bytes + max_record_bytes) {
            Bytes next = new_frame(), full;
            append(next, ByteView(frames.back()).last(added));
            full.reserve(before + gcm_tag_bytes);  // it had grown for what is in the next one
            append(full, ByteView(frames.back()).first(before));
            frames.back() = std::move(full);
            frames.push_back(std::move(next));
        }
        queued = true;
        bytes_[index_of(lane)] += added;
        return note_queued();
    }
    template <class Part>
    static void add(Bytes& frame, const Part& part) {
        if constexpr (requires { Part::type; })
            append_message(frame, part);
        else
            append(frame, part);
    }
    static Bytes new_frame() {
        Bytes frame;
        frame.reserve(smallest_allocation);
        frame.resize(frame_header_bytes);
        return frame;
    }
    Result note_queued() {
        if (writer_ != Writer::nobody) return Result::queued;
        writer_ = Writer::due;
        return Result::due;
    }

    void end(State state) {
        std::lock_guard lock(mutex_);
        if (state_ != State::closed) state_ = state;
        if (writer_ == Writer::nobody) writer_ = Writer::due;  // somebody ends the stream
        if (state_ == State::closed)
            for (std::deque<Bytes>& frames : lanes_) frames.clear();
        bulk_taken_.notify_all();
    }

    const std::array<std::size_t, 2> bounds_;  // of each lane, like the other arrays here
    mutable std::mutex mutex_;                 // guards everything below
    std::condition_variable bulk_taken_;       // for wait_for_bulk_room
    std::array<std::deque<Bytes>, 2> lanes_;
    std::array<std::size_t, 2> bytes_{};  // queued, without the frames' headers
    State state_ = State::open;
    Writer writer_ = Writer::nobody;
};

// One end of a conversation between client and server. One thread owns it: that one alone reads and
// waits. What is marked so is for any thread.
class Connection {
  public:
    Connection(Socket socket, std::size_t bound, std::size_t bulk_bound)
        : outbox(bound, bulk_bound),
          socket_(std::move(socket)),
          frames_(socket_, max_record_frame) {}
    Connection(const Connection&) = delete;
    Connection& operator=(const Connection&) = delete;

    Outbox outbox;  // any thread

    // Called by whichever thread has found the socket full: somebody who waits for the socket to
    // take more must call flush_full() then. (Our own wait() does, too.) Set it before anything is
    // sent.
    std::function<void()> on_full = [] {};

    // Tells `trace` what passes here, from now on; the keys' names are the records'.
    void watch(const Tracer& trace, std::string_view receiving, std::string_view sending) {
        trace_ = frames_.trace = trace;
        key_names_ = {receiving, sending};
    }
    const Tracer& trace() const { return trace_; }

    // ---- The handshake: frames in the clear -----------------------------------------------------

    // The content of the next frame, valid until the next call. Blocks. Throws ProtocolError,
    // TimedOut or NetworkError (also when the stream ends).
    ByteSpan receive_frame(Clock::time_point deadline) {
        std::optional<ByteSpan> frame = frames_.next(max_handshake_bytes, deadline);
        if (!frame) throw NetworkError(ended);
        tell_handshake(TraceEvent::Way::in, *frame);
        return *frame;
    }
    // Blocks. Throws TimedOut or NetworkError.
    void send_frame(ByteView content, Milliseconds patience) {
        tell_handshake(TraceEvent::Way::out, content);
        socket_.write_all(make_frame(content), patience);
    }
    // From now on everything travels in records.
    void secure(Secret<32> receiving_key, Secret<32> sending_key) {
        opener_.emplace(std::move(receiving_key));
        sealer_.emplace(std::move(sending_key));
        heard_ = Clock::now();
    }
    bool is_secure() const { return sealer_.has_value(); }

    // ---- Receiving ------------------------------------------------------------------------------

    // The next message of what has come so far; its body is valid until the next call. Nothing: the
    // input is used up for the moment; flush what you have said, then wait(). Does not block.
    // Throws ProtocolError for a record or a message that must not be, NetworkError when the stream
    // has ended.
    std::optional<Message> next() {
        while (left_.empty()) {
            std::optional<ByteSpan> frame = frames_.take(max_record_frame);
            if (!frame) {
                FrameReader::Got got = frames_.read_now();
                if (got == FrameReader::Got::the_end) throw NetworkError(ended);
                if (got == FrameReader::Got::nothing_now) return std::nullopt;
                heard_ = Clock::now();
                asked_ = false;
                continue;
            }
            Bytes wire;  // before it is overwritten
            if (trace_) wire = make_frame(*frame);
            ByteView record = opener_->open(*frame);
            if (trace_) tell_record(TraceEvent::Way::in, wire, record, opener_->number() - 1);
            // Nobody needs them, and whoever sends them for ever would be served for ever.
            if (record.empty()) throw ProtocolError("Received an empty record.");
            left_ = Reader(record, "a record");
        }
        return take_message(left_);
    }
    // The next message, for a login: blocks until it is there. Throws as next(), and TimedOut.
    Message expect(Clock::time_point deadline) {
        for (;;) {
            flush();
            if (std::optional<Message> message = next()) return *message;
            if (Clock::now() >= deadline) throw TimedOut("The other side took too long.");
            wait(deadline);
        }
    }

    // How long the other side may be silent before it is pinged, and then again before wait()
    // throws TimedOut. At first, and for a login, for ever.
    void set_patience(Milliseconds patience) { patience_ = patience; }

    // Blocks until there is something to read, until `deadline`, or until `waker` is awake;
    // meanwhile it sends what a full socket has left behind, and pings. Who has no use for more
    // input now, because it is behind, says so.
    void wait(Clock::time_point deadline, const Waker* waker = nullptr, bool reading = true) {
        std::array<detail::PollEntry, 2> entries{};
        std::size_t count = 0;
        if (waker != nullptr) entries[count++] = {waker->handle(), POLLIN, 0};
        auto events = static_cast<short>((reading ? POLLIN : 0) | (outbox.is_full() ? POLLOUT : 0));
        if (events != 0) entries[count++] = {socket_.handle(), events, 0};
        Clock::time_point silence_ends = heard_ + (asked_ ? 2 : 1) * patience_;
        if (reading) deadline = std::min(deadline, silence_ends);
        bool ready = detail::poll_until(std::span(entries).first(count), deadline);
        if (count > 0 && (entries[count - 1].revents & ~POLLIN) != 0) flush_full();
        if (ready || !reading || Clock::now() < silence_ends) return;
        if (asked_) throw TimedOut("The other side fell silent.");
        asked_ = true;
        frames_.shrink();
        outbox.push_control(Ping{});
        flush();
    }
    // Blocks for that long, or until the connection is over. Reads nothing: TCP makes the other
    // side wait.
    void pause(Milliseconds duration) { socket_.wait(0, Clock::now() + duration); }

    // ---- Sending --------------------------------------------------------------------------------

    // Sends what is queued, as far as the socket takes it at once. Does not block. Any thread. If
    // the connection breaks, the owner is the one who hears of it.
    void flush() {
        if (outbox.start_writing(Outbox::Writer::due)) write();
    }
    // Goes on at a socket that was full. Does not block. Any thread.
    void flush_full() {
        if (outbox.start_writing(Outbox::Writer::full)) write();
    }
    // One message, at once.
    template <class T>
    void send(const T& message) {
        outbox.push_control(message);
        flush();
    }

    // ---- The end --------------------------------------------------------------------------------

    // What is queued is still sent, then our stream ends. Does not block. Any thread.
    void finish() {
        outbox.finish();
        flush();
    }
    // Everything is over at once; the owner notices. Does not block. Any thread.
    void abort() noexcept {
        outbox.close();
        socket_.shut_down();
    }
    // The polite end: finish(), until all is sent or `to_send` is over; then what the other side
    // still sends is read away until it ends its stream too (see Socket::read_away), or `to_end` is
    // over. Blocks.
    void close(Milliseconds to_send, Milliseconds to_end) noexcept {
        try {
            finish();
            for (auto until = Clock::now() + to_send;
                 outbox.is_being_emptied() && Clock::now() < until;) {
                socket_.wait(POLLOUT, until);
                flush_full();
            }
            socket_.read_away(Clock::now() + to_end);
        } catch (const std::exception&) {
            // it ends all the same
        }
        abort();
    }

    detail::SocketHandle handle() const { return socket_.handle(); }  // for poll()

  private:
    static constexpr const char* ended = "The other side closed the connection.";

    // Called by one thread at a time, as Outbox::start_writing says. The table above.
    void write() {
        try {
            for (Outbox::State state{};;) {
                if (sending_.empty()) {
                    std::optional<Bytes> frame = outbox.take(state);
                    if (!frame && state == Outbox::State::finishing) socket_.finish_writing();
                    if (!frame && state == Outbox::State::closed) socket_.shut_down();
                    if (!frame) return;
                    seal(*frame);
                    sending_ = std::move(*frame);
                    sent_ = 0;
                }
                std::size_t taken = socket_.write_now(ByteView(sending_).subspan(sent_));
                if (trace_ && taken != 0)
                    trace_({TraceEvent::Layer::stream, TraceEvent::Way::out,
                            ByteView(sending_).subspan(sent_, taken)});
                sent_ += taken;
                if (sent_ < sending_.size()) {
                    outbox.stop_at_full_socket();
                    on_full();
                    return;
                }
                sending_ = Bytes();  // gives the memory back
            }
        } catch (const std::exception&) {
            abort();
        }
    }

    void seal(Bytes& frame) {
        SecretBytes plain;  // before it is overwritten
        if (trace_) plain.assign(frame.begin() + frame_header_bytes, frame.end());
        sealer_->seal(frame);
        if (trace_) tell_record(TraceEvent::Way::out, frame, plain, sealer_->number() - 1);
    }

    void tell_handshake(TraceEvent::Way way, ByteView frame) {
        ++handshake_frames_;
        if (!trace_) return;
        trace_(
            {TraceEvent::Layer::handshake, way, make_frame(frame), frame, {}, handshake_frames_});
    }
    // A record, and the messages in it.
    void tell_record(TraceEvent::Way way, ByteView wire, ByteView plain, std::uint64_t number) {
        std::string_view key = key_names_[way == TraceEvent::Way::out ? 1 : 0];
        trace_({TraceEvent::Layer::record, way, wire, plain, key, number});
        try {
            for (Reader left(plain, "a record"); !left.empty();) {
                Message message = take_message(left);
                std::size_t size = message_header_bytes + message.body.size();
                ByteView all(message.body.data() - message_header_bytes, size);
                trace_({TraceEvent::Layer::message,
                        way,
                        all,
                        message.body,
                        {},
                        static_cast<std::uint64_t>(message.type)});
            }
        } catch (const ProtocolError&) {
            // whoever takes the messages out will say so
        }
    }

    Tracer trace_;  // any thread
    std::array<std::string_view, 2> key_names_;
    std::uint64_t handshake_frames_ = 0;  // either way

    Socket socket_;  // other threads: send() by who writes, and shut_down()

    // The owner's.
    FrameReader frames_;
    std::optional<RecordCipher> opener_;
    Reader left_{{}, "a record"};
    Clock::time_point heard_ = Clock::now();
    Milliseconds patience_ = std::chrono::hours(24 * 365);
    bool asked_ = false;

    // Of who is writing.
    std::optional<RecordCipher> sealer_;
    Bytes sending_;  // a sealed frame, of which so many bytes are sent:
    std::size_t sent_ = 0;
};

// ---- Try it -------------------------------------------------------------------------------------
//
// Break: chat-behind-files (chat waits until the files are through) and queue-without-end (who does
// not read has all that waits for them kept in the server's memory).
//
// Write what a cancelled file wants: to TAKE BACK what waits in the bulk lane.
//
//      std::size_t Outbox::take_back_bulk()        // any thread; how many bytes of messages it was
//
// Chat stays, and so does the table of who empties the outbox: if somebody is due to write, they
// still are. Whoever sleeps until the bulk lane has room is woken, and the lane takes its whole
// bound again.
// Green: exercise: take back
//
// A file's messages were sealed with numbers (chapter 8). What will their reader say of the gap?

// =================================================================================================
//  Chapter 11. The server
// =================================================================================================
//
// A relay. It knows who is online and passes on what it cannot read. Its threads:
//
//      run()               accepts connections, and joins the threads of those that ended
//      one per connection  handshake and login in one thread, everything after that in another:
//                          reads, handles, and writes to the members whom it concerns
//      the pump            writes to those members whose sockets were full, and tells everybody
//                          who has come and gone
//
//      alice --> socket --> alice's thread --+--> outbox of bob   --> bob's socket
//                                            +--> outbox of carol --> carol's socket (full)
//                                                       |                 ^
//                                                       +---> the pump ---+
//
// A thread for each connection is the simplest thing that works: the code of one connection reads
// from top to bottom, like the conversation. Alice's thread puts her messages into the outboxes of
// the others, and when it has handled what has come from her so far, it sends those outboxes as far
// as the sockets take it (chapter 10). It never waits for bob or carol, only for alice.
// (Ten thousand clients cost ten thousand stacks, of some 20 KiB in use. One loop for all would
// save most of that, and cut each conversation into states that somebody has to keep.)
//
// What goes wrong in servers, and what this one does about it:
//
//   - Strangers that connect and say nothing, or one byte a second: a deadline for the handshake,
//     one for the login, and a bound on how many may be in that state from one address.
//   - Strangers from thousands of addresses: they compete for slots of their own, and members are
//     not touched. When the slots are used up, the oldest stranger goes, first those that have not
//     finished the handshake. If the newcomer went instead, whoever has filled the slots once would
//     keep everybody out; so an attacker has to fill them again and again, faster than a client
//     needs for its handshake.
//   - A connection storm: each handshake costs an RSA operation, so only as many as there are
//     processors run at once. The threads that serve the chat get their share.
//   - A member that reads too slowly: its outbox is bounded, payloads for it are refused, and when
//     its socket takes nothing at all for a while the pump drops it. So the memory of all outboxes
//     is bounded for each member, whatever anybody sends.
//   - Guesses of passwords, and what keeps the owner of a name out: see "Nobody is too fast".
//   - A member that talks too fast: the server reads from it more slowly, and TCP makes it wait.
//   - A member whose machine vanished: silence is answered with a Ping, and further silence with
//     the end. If the same user logs in again meanwhile, the old connection gets a few seconds to
//     answer a Ping, or to say anything else; so a dead connection locks nobody out, and a live
//     one, also one whose login is still being completed, is never pushed out (P8).
//   - A member that ends the stream while much waits for it: it is off the list at once, and what
//     waited is thrown away. Only around a goodbye or a refusal is an outbox sent to its end.
//   - A thousand who come at once: who is here is told in batches, not one by one (see Members).
//   - No descriptor or thread left: the newcomer is turned away, the others do not notice.
//
// What it does not protect against: whoever runs it. The operator can keep people apart, tell them
// that somebody is here or is not, drop what they write, and see who writes to whom; reading along,
// or changing it unnoticed, is what chapter 8 keeps from the operator too. And a network that is
// simply full: strangers compete for slots, but all share one line.
//
// Locks, what each guards, and what whoever holds it may wait for. Under sessions_mutex_ or Members
// (turn_ before mutex_), an Outbox's or the pump's is taken as well; otherwise one at a time. (And
// the semaphore handshakes_ lets as many compute as there are processors.)
//
//      AuthStore        the accounts        nothing. Who changes one sleeps until that is stored
//      TokenBuckets     who tries what      nothing
//      sessions_mutex_  all connections     the log, if a newcomer is refused. run() sleeps on it
//                                           until a connection has ended
//      Members: turn_   whose turn it is    who has the list (for as long as a room message takes)
//      Members: mutex_  who is here         nothing. A login sleeps on it, for another login's Pong
//      Outbox           chapter 10          nothing
//      Pump             who is new there    nothing. The pump sleeps in poll(), without a lock
//      TraceLog         (with --trace)      the disk. It is taken under any of the others

// ---- users.db -----------------------------------------------------------------------------------
//
// One line for each account; comments (#) and empty lines stay where they are:
//
//      alice SCRAM-SHA-256$600000:<salt>$<StoredKey>:<ServerKey> <identity> <time of creation>
//
// <identity> is the user's public key (base64 of its SPKI, chapter 8), or - while unknown. The
// server only keeps it for the record: whether an identity is to be trusted, the clients decide.

// Now, as RFC 3339 writes it, in UTC: 2026-11-23T09:41:00Z
inline std::string rfc3339_now() {
    auto now = std::chrono::floor<std::chrono::seconds>(std::chrono::system_clock::now());
    auto day = std::chrono::floor<std::chrono::days>(now);
    std::chrono::year_month_day date(day);
    std::chrono::hh_mm_ss time(now - day);
    auto two = [](auto n) { return concat(n < 10 ? "0" : "", n); };
    return concat(static_cast<int>(date.year()), "-", two(static_cast<unsigned>(date.month())), "-",
                  two(static_cast<unsigned>(date.day())), "T", two(time.hours().count()), ":",
                  two(time.minutes().count()), ":", two(time.seconds().count()), "Z");
}

struct Account {
    std::string user;
    ScramVerifier verifier;
    Bytes identity;       // SPKI, DER; empty while unknown
    std::string created;  // RFC 3339

    std::string line() const {
        return concat(user, " ", verifier.text(), " ",
                      identity.empty() ? std::string("-") : to_base64(identity), " ", created);
    }
    // Throws Error.
    static Account parse(const std::vector<std::string>& words) {
        if (words.size() != 4)
            throw Error(concat("it has ", words.size(),
                               " fields; 4 are needed: name, password "
                               "entry, identity key or -, time."));
        if (!has_form_of_name(words[0])) throw Error("the name is not valid.");
        Account account{words[0], ScramVerifier::parse(words[1]), {}, words[3]};
        if (words[2] != "-") account.identity = from_base64(words[2]);
        return account;
    }
};

// The salt of the accounts in users.db.example. Their passwords are public, so the server warns.
inline constexpr std::string_view example_salt = "EXAMPLE-PASSWORD";

// The accounts, in memory and on disk. Any thread may call it.
//
// Writing takes as long as the disk does, and many may want to write at once. So whoever has a
// change puts it into a queue. One of them writes all that is queued, in one piece, the others
// sleep until theirs is done, and what comes meanwhile is for the next piece. Whoever only asks
// waits for none of them, and gets what is on the disk.
class AuthStore {
  public:
    // Reads `path`; no file means no accounts yet. Throws Error, with the line number, for a line
    // that cannot be understood: guessing would one day lose somebody's account.
    explicit AuthStore(std::filesystem::path path) : path_(std::move(path)) {
        std::optional<SecretBytes> content = read_lines(
            path_, max_users_db_bytes, "Correct the line, or put # before it.",
            [&](const std::vector<std::string>& words) {
                Account account = Account::parse(words);
                if (!accounts_.emplace(account.user, Entry{account, true}).second)
                    throw Error(concat("the name \"", account.user, "\" stands there twice."));
            });
        if (content) on_disk_ = sha256(*content);
    }

    std::optional<Account> find(const std::string& user) const {
        std::lock_guard lock(mutex_);
        auto found = accounts_.find(user);
        if (found == accounts_.end() || !found->second.stored) return std::nullopt;
        return found->second.account;
    }

    // Adds an account and has it on disk when it returns. False if the name is taken, be it by one
    // that is just being written. Blocks; throws Error if it cannot be written (then nothing has
    // changed).
    bool add(const Account& account) {
        Change change{account};
        std::unique_lock lock(mutex_);
        if (accounts_.contains(account.user)) return false;
        pending_.reserve(pending_.size() + 1);  // nothing may fail once the name is in the list
        accounts_.emplace(account.user, Entry{account, false});
        write_in_turn(change, lock);
        return true;
    }

    // Records the identity key of a user; as add().
    void set_identity(const std::string& user, ByteView identity) {
        std::unique_lock lock(mutex_);
        auto found = accounts_.find(user);
        if (found == accounts_.end() || !found->second.stored)
            throw Error(concat("There is no account \"", user, "\"."));
        Change change{found->second.account};
        change.account.identity = to_bytes(identity);
        write_in_turn(change, lock);
    }

    std::vector<std::string> users_with_example_password() const {
        std::lock_guard lock(mutex_);
        std::vector<std::string> users;
        for (const auto& [user, entry] : accounts_)
            if (as_text(entry.account.verifier.salt) == example_salt) users.push_back(user);
        return users;
    }
    // With those that are just being written, so that a limit holds for them too.
    std::size_t size() const {
        std::lock_guard lock(mutex_);
        return accounts_.size();
    }

  private:
    static constexpr std::size_t max_users_db_bytes = 1U << 30;

    struct Entry {
        Account account;
        bool stored;  // not yet: the name is taken, but there is no such account
    };
    struct Change {  // it lives in the function of whoever waits for it
        Account account;
        bool done = false;
        std::string failure{};  // what has prevented it
    };

    // Queues a change and returns when it is on the disk. Throws what has prevented that.
    void write_in_turn(Change& change, std::unique_lock<std::mutex>& lock) {
        pending_.push_back(&change);
        while (!change.done) {
            if (writing_)
                written_.wait(lock);
            else
                write_pending(lock);
        }
        if (!change.failure.empty()) throw Error(change.failure);
    }
    void write_pending(std::unique_lock<std::mutex>& lock) {
        std::vector<Change*> batch = std::exchange(pending_, {});
        writing_ = true;
        lock.unlock();
        std::string failure;
        try {
            write(batch);
        } catch (const std::exception& e) {
            failure = e.what();
        }
        lock.lock();
        for (Change* change : batch) {  // none of it can fail: the file is written
            auto entry = accounts_.find(change->account.user);
            if (failure.empty())
                entry->second = {std::move(change->account), true};
            else if (!entry->second.stored)
                accounts_.erase(entry);
            change->failure = failure;
            change->done = true;
        }
        writing_ = false;
        written_.notify_all();
    }

    // The disk's part, without the mutex: one thread at a time, see writing_.
    void write(const std::vector<Change*>& batch) {
        std::map<std::string_view, const Account*> changed;  // of two for one user, the later
        for (const Change* change : batch) changed[change->account.user] = &change->account;
        std::optional<SecretBytes> old = read_unchanged();
        std::string content;
        if (old) content.reserve(old->size() + 1024 * batch.size());
        for (std::string_view left = old ? as_text(*old) : ""; !left.empty();) {
            std::string_view line = left.substr(0, left.find('\n'));
            left.remove_prefix(std::min(left.size(), line.size() + 1));
            auto own = changed.find(first_word(line));
            if (own == changed.end()) {
                content.append(line).append("\n");
            } else {
                content.append(own->second->line()).append("\n");
                changed.erase(own);
            }
        }
        for (const Change* change : batch)  // those that had no line are new
            if (changed.erase(change->account.user) != 0)
                content.append(change->account.line()).append("\n");
        write_file(path_, as_bytes(content), FileMode::owner_only);
        on_disk_ = sha256(as_bytes(content));
    }
    static std::string_view first_word(std::string_view line) {
        constexpr std::string_view blank = " \t\r";
        line.remove_prefix(std::min(line.find_first_not_of(blank), line.size()));
        return line.substr(0, line.find_first_of(blank));
    }
    // The file, comments and all. Somebody may have edited it while we run: then it is not what we
    // know, and writing our accounts over it would lose the edit. Throws Error.
    std::optional<SecretBytes> read_unchanged() const {
        std::optional<SecretBytes> content = read_file(path_, max_users_db_bytes);
        std::optional<Digest> found;
        if (content) found = sha256(*content);
        if (found != on_disk_)
            throw Error(concat(path_.string(),
                               " was changed by another program while the server "
                               "runs, so the server does not write it. Restart the server."));
        return content;
    }

    const std::filesystem::path path_;
    std::optional<Digest> on_disk_;  // of the file as we last read or wrote it: who writes, owns it
    mutable std::mutex mutex_;       // guards everything below
    std::condition_variable written_;  // some changes are done
    std::map<std::string, Entry> accounts_;
    std::vector<Change*> pending_;  // in the order in which they came
    bool writing_ = false;          // a thread is in write()
};

// ---- Nobody is too fast -------------------------------------------------------------------------
//
// Guessing a password must be slow, for whoever knows a name and has a botnet, and the user whom
// the name belongs to must get in all the same.
//
// A try counts when it begins. If only a failure counted, a hundred guesses that begin together
// would all find the bucket full. So each takes its token first, and a right password gives it
// back. When there are no tokens left it is a queue: the first waits 4 s, the next one 8 s; whoever
// would have to wait longer is told so at once (too_many_tries), and costs nothing: no token, and
// no thread that waits. There is a bucket for each account (three tries are free: people mistype)
// and one for each address (150, a few more than may be under way from there at once: a thousand
// people behind one router log in again when the server restarts, and nobody's right password uses
// one up).
//
// A ticket gets its owner in. With the account's queue full, its user would be refused like the
// guessers: whoever knows a name could keep its owner out for ever. But a client that was logged in
// once can show that (OWASP calls it a device cookie). LoginDone brings it
//
//      ticket = HMAC-SHA-256(secret, "ticket " user || StoredKey)
//
// with a secret that only the server can make from its private key. The next time the client sends
// the ticket with client-first, the server computes it again, so it stores nothing; another
// password is another StoredKey and makes it invalid. A try with a valid ticket takes its token
// from a bucket that only holders of it share, and from no other. It is no password: without one
// it only lets its owner wait with fewer. A ticket that is not valid counts as none.

// How fast somebody may go on: a bucket of tokens that refills at a steady rate. What they do takes
// some out; when it is empty, they wait until it is not. One thread uses it.
class TokenBucket {
  public:
    TokenBucket(double per_second, double burst)
        : rate_(per_second), burst_(burst), tokens_(burst) {}

    // Takes `cost` tokens and says how long to wait before going on: at most longest_pause.
    Milliseconds take(double cost, Clock::time_point now) {
        tokens_ = std::max(at(now) - cost, -rate_ * longest_pause.count());
        last_ = now;
        return wait();
    }
    // Takes one token, and a place in the queue of those who wait. Nothing, and no token is taken,
    // if that would be longer than `patience`.
    std::optional<Milliseconds> queue(Clock::time_point now, std::chrono::seconds patience) {
        double left = at(now) - 1;
        if (-left > rate_ * static_cast<double>(patience.count())) return std::nullopt;
        tokens_ = left;
        last_ = now;
        return wait();
    }
    void give_back_one() { ++tokens_; }
    double missing(Clock::time_point now) const { return burst_ - at(now); }

    static constexpr std::chrono::duration<double> longest_pause{4};

  private:
    double at(Clock::time_point now) const {
        std::chrono::duration<double> passed = now - last_;
        return std::min(burst_, tokens_ + passed.count() * rate_);
    }
    Milliseconds wait() const {
        return Milliseconds(static_cast<std::int64_t>(tokens_ < 0 ? -tokens_ / rate_ * 1000 : 0));
    }
    double rate_, burst_, tokens_;
    Clock::time_point last_{};
};

// Such buckets for what strangers do, one for each account or address. Bounded, so that nobody
// fills our memory with names. Any thread may call it.
class TokenBuckets {
  public:
    TokenBuckets(double per_second, double burst,
                 std::chrono::seconds patience = std::chrono::seconds(8))
        : fresh_(per_second, burst), patience_(patience) {}

    // A try begins: how long it has to wait for its turn. Nothing if that would be too long.
    std::optional<Milliseconds> take(const std::string& key, Clock::time_point now) {
        std::lock_guard lock(mutex_);
        // Whoever is missed the least goes first: names by the thousand do not free who is guessing
        for (double missing : {0.0, 1.0, std::numeric_limits<double>::infinity()})
            if (buckets_.size() > max_buckets)
                std::erase_if(buckets_, [&](const auto& entry) {
                    return entry.second.missing(now) <= missing;
                });
        return buckets_.try_emplace(key, fresh_).first->second.queue(now, patience_);
    }
    // A try was none: its token, and no more.
    void give_back(const std::string& key) {
        std::lock_guard lock(mutex_);
        if (auto found = buckets_.find(key); found != buckets_.end()) found->second.give_back_one();
    }
    void refill(const std::string& key) {
        std::lock_guard lock(mutex_);
        buckets_.erase(key);
    }

  private:
    static constexpr std::size_t max_buckets = 20'000;
    const TokenBucket fresh_;
    const std::chrono::seconds patience_;
    std::mutex mutex_;  // guards buckets_
    std::map<std::string, TokenBucket> buckets_;
};

// ---- The relay ----------------------------------------------------------------------------------

enum class LogLevel { info, warning, relayed };

struct ServerOptions {
    std::filesystem::path data_directory = ".";  // users.db and the server's key live here
    std::string bind = "127.0.0.1";              // an address of this machine; "::" means all
    std::uint16_t port = 5000;                   // 0: let the system choose
    int rsa_bits = default_rsa_bits;             // of a key that is made at first start
    bool new_key = false;  // make one also if this directory had one that is missing now
    bool registration_open = true;
    bool log_relayed = false;                  // a line for each payload
    std::size_t max_clients = 1000;            // who are logged in
    std::size_t max_strangers = 1000;          // connections that are not logged in yet
    std::size_t max_logins_per_address = 128;  // of those
    std::size_t max_accounts = 100'000;
    std::size_t queue_bound = std::size_t{8} << 20;  // bytes of chat that may wait for one member
    // And of file data: 4 MiB of credit, twice, as an attempt that broke off has left some behind.
    std::size_t bulk_queue_bound = std::size_t{9} << 20;
    Milliseconds bulk_patience{1'000};  // of a sender, for room in somebody's full bulk lane
    double messages_per_second = 2000;  // from one member, in the long run
    double message_burst = 20'000;      // and in one go
    Milliseconds handshake_timeout{10'000};
    Milliseconds login_timeout{60'000};  // the client's slow hash is part of it
    Milliseconds ping_after{30'000};     // of silence
    Milliseconds announce_every{10};     // Joined and Left, gathered
    // For a sign of life, when the same user logs in again: longer than TokenBucket::longest_pause.
    Milliseconds takeover_patience{5'000};
    Milliseconds write_timeout{20'000};
    std::function<void(LogLevel, const std::string&)> log = [](LogLevel, const std::string&) {};
    // What `who` (the address of a client) is to be watched with. Any thread calls what it returns,
    // perhaps with locks held: it must not call the server, and whoever is slow there slows it.
    TracerFor trace = [](std::string_view) { return Tracer(); };
};

namespace detail {

// The reason why the server ends a conversation, as it is told to the client.
struct Refusal : Error {
    GoodbyeReason reason;
    Refusal(GoodbyeReason why, const std::string& sentence) : Error(sentence), reason(why) {}
};

// One connection and what the server knows of who is behind it. Its own thread's, if it does not
// say otherwise.
struct Session : std::enable_shared_from_this<Session> {
    Session(Socket accepted, const Endpoint& from, const ServerOptions& options)
        : connection(std::move(accepted), options.queue_bound, options.bulk_queue_bound),
          bucket(options.messages_per_second, options.message_burst),
          host(from.host()),
          address(from.text()) {
        connection.watch(options.trace(address), "client to server", "server to client");
    }

    Connection connection;  // others: what is marked "any thread" there
    Digest channel_binding{};
    TokenBucket bucket;
    const std::string host, address;  // "127.0.0.1", "127.0.0.1:41234"

    // Guarded by Members.
    //   connecting --> stranger --> logging_in --> member --> left        and from the first three
    //    handshake      password        card                              it goes on to refused
    // (Its own thread takes the first step, without that lock: nobody else changes a stranger.)
    enum class Stage { connecting, stranger, logging_in, member, left, refused };
    std::atomic<Stage> stage = Stage::connecting;
    std::string user;      // empty for a stranger
    LoginId id{};          // likewise
    Bytes card;            // a member's
    std::size_t told = 0;  // see Members

    std::atomic<std::uint64_t> handled = 0;  // messages of a member: whoever sends some is alive

    // Its thread's: in whose outboxes it has put something that is not flushed yet, and how much.
    std::vector<std::shared_ptr<Session>> touched;
    std::size_t unflushed = 0;
    std::optional<std::uint32_t> taken;  // its last room message, until that is acknowledged

    bool dropped = false;                // guarded by Server: its slot is somebody else's now
    std::thread login_thread;            // joined by `thread`, or by Server::run
    std::thread thread;                  // joined by Server::run
    std::atomic<bool> finished = false;  // there is nothing more to do
};
using SessionPtr = std::shared_ptr<Session>;

// Who is here. Any thread, which must not hold a lock of its own. Nothing under this lock waits for
// a network or a disk; the outboxes' locks are taken under it, one at a time.
//
// Announcements. A thousand who join one after the other must not be half a million small messages.
// What there is to announce since the last time goes to everybody in one piece, at most once in
// some milliseconds, and more rarely the more there are to be told. Who has joined meanwhile knows
// the beginning of that piece from the roster, and gets the rest: Session::told is where it begins.
// Nobody gets a message of a login that was not announced to them, nor hears that a login is gone
// before its Left: list_for() and announce_now() see to it.
class Members {
  public:
    // `on_news` is called, under the lock, when there is something to announce.
    Members(const ServerOptions& options, std::function<void()> on_news)
        : options_(options), on_news_(std::move(on_news)) {}

    std::size_t size() const {
        std::shared_lock lock = to_read();
        return members_.size();
    }

    // Makes a session the one login of its user, and numbers it. Throws Refusal. If there is
    // another login, the live one stays (P8): one that is still being completed is alive (its
    // client may be making a key, and answers nothing meanwhile; login_timeout bounds that), a
    // member is if anything that it has sent is handled after a ping: its Pong, or, if it floods,
    // some of the megabytes before that. This waits for it up to takeover_patience. Returns what
    // there is to log.
    std::string claim(const SessionPtr& session, const std::string& user) {
        std::unique_lock lock = to_change();
        std::string line;
        SessionPtr other = of(user);
        if (other && other->stage == Session::Stage::member) {
            std::uint64_t before = other->handled;
            other->connection.send(Ping{});
            changed_.wait_for(lock, options_.takeover_patience, [&] {
                return other->handled != before || other->stage != Session::Stage::member;
            });
            if (other->handled == before) {
                other->connection.abort();
                line =
                    remove_locked(*other, "its connection was dead when the user logged in again");
            }
            other = of(user);
        }
        if (other && is_online(*other))
            throw Refusal(GoodbyeReason::already_online,
                          concat("\"", user, "\" is online already, and only once at a time."));
        if (online_ >= options_.max_clients)
            throw Refusal(GoodbyeReason::server_full, "The server is full. Try again later.");
        if (other) other->connection.abort();  // one user has one outbox: its last words are over
        by_name_[user] = session;
        ++online_;
        session->user = user;
        session->id = LoginId{++last_id_};
        session->stage = Session::Stage::logging_in;
        return line;
    }
    // A Pong has come, and is counted in Session::handled: claim() may be waiting for it.
    void note_pong() {
        std::unique_lock lock = to_change();
        changed_.notify_all();
    }

    // Tells the newcomer about everybody, and puts the newcomer into the next announcement, in one
    // step: under the lock nobody can come or go in between, so nobody is missed and nobody is told
    // twice. Returns how many are here.
    std::size_t join(const SessionPtr& session) {
        std::unique_lock lock = to_change();
        Outbox& outbox = session->connection.outbox;
        for (const SessionPtr& other : members_)
            outbox.push_control(Joined{other->id, other->user});
        outbox.push_control(Ready{});
        append_news(Joined{session->id, session->user});
        session->told = news_.size();
        members_.insert(lower_bound(session->id), session);
        session->stage = Session::Stage::member;
        return members_.size();
    }

    // Takes a session off the lists, at once, however long its thread still has to do. Returns what
    // there is to log: nothing if it was off them already.
    std::string remove(Session& s, const std::string& reason, bool refused = true) {
        std::unique_lock lock = to_change();
        return remove_locked(s, reason, refused);
    }
    // Its thread is at its end: nothing waits in its outbox any more.
    void forget(const SessionPtr& session) {
        std::unique_lock lock = to_change();
        if (of(session->user) == session) by_name_.erase(session->user);
    }

    // The members in ascending order of their numbers, as long as the list is held.
    struct List {
        std::shared_lock<std::shared_mutex> lock;
        const std::vector<SessionPtr>& all;

        auto find(LoginId id) const {
            auto at = std::lower_bound(all.begin(), all.end(), id, before);
            return at != all.end() && (*at)->id == id ? at : all.end();
        }
    };
    List list() const { return {to_read(), members_}; }
    // For `s` to say something to them. Throws NetworkError for one that was taken off the list.
    List list_for(Session& s) {
        List members = list();
        if (s.told != 0) {  // it has joined, and not everybody knows it
            members.lock.unlock();
            announce_now(s.touched);
            members.lock = to_read();
        }
        if (!is_online(s)) throw NetworkError("Somebody else has ended the connection.");
        return members;
    }

    // When the next announcement is due.
    Clock::time_point next_announcement() const {
        std::shared_lock lock = to_read();
        return announce_at_;
    }
    // Puts it into everybody's outbox; those that are to be flushed then are appended to `touched`.
    void announce_now(std::vector<SessionPtr>& touched) {
        std::unique_lock lock = to_change();
        announce_at_ = Clock::time_point::max();
        if (!news_.empty()) announce();
        std::move(due_.begin(), due_.end(), std::back_inserter(touched));
        due_.clear();
    }

  private:
    // A shared mutex may let readers in for ever while a writer waits. So everybody queues for it.
    std::shared_lock<std::shared_mutex> to_read() const {
        std::lock_guard turn(turn_);
        return std::shared_lock(mutex_);
    }
    std::unique_lock<std::shared_mutex> to_change() {
        std::lock_guard turn(turn_);
        return std::unique_lock(mutex_);
    }

    static bool before(const SessionPtr& member, LoginId id) { return member->id < id; }
    static bool is_online(const Session& s) {
        return s.stage == Session::Stage::logging_in || s.stage == Session::Stage::member;
    }
    std::vector<SessionPtr>::iterator lower_bound(LoginId id) {
        return std::lower_bound(members_.begin(), members_.end(), id, before);
    }

    // Under mutex_, like the rest:
    SessionPtr of(const std::string& user) const {
        auto found = by_name_.find(user);
        return found == by_name_.end() ? nullptr : found->second;
    }
    std::string remove_locked(Session& s, const std::string& reason, bool was_refused = true) {
        using enum Session::Stage;
        Session::Stage stage = s.stage;
        if (stage == left || stage == refused) return "";
        if (is_online(s)) --online_;
        s.stage = stage == member ? left : refused;
        changed_.notify_all();
        if (stage != member) {
            std::string who =
                concat(s.address, s.user.empty() ? "" : concat(" (\"", s.user, "\")"));
            return was_refused ? concat("refused ", who, ": ", reason)
                               : concat(who, " went before it was logged in: ", reason);
        }
        members_.erase(lower_bound(s.id));
        append_news(Left{s.id});
        return concat("\"", s.user, "\" left: ", reason);
    }
    void announce() {
        for (const SessionPtr& member : members_) {
            ByteView news = ByteView(news_).subspan(std::exchange(member->told, 0));
            if (news.empty()) continue;
            Outbox::Result result = member->connection.outbox.push_control(news);
            if (result == Outbox::Result::due) due_.push_back(member);
            if (result == Outbox::Result::refused) member->connection.abort();
        }
        news_.clear();
        announced_at_ = Clock::now();
    }
    template <class T>
    void append_news(const T& message) {
        append_message(news_, message);
        if (news_.size() > max_record_bytes / 2) announce();  // it must fit into a record
        auto pause =
            options_.announce_every + time_to_tell_one * static_cast<std::int64_t>(members_.size());
        Clock::time_point due = std::max(Clock::now(), announced_at_ + pause);
        if (due >= announce_at_) return;
        announce_at_ = due;
        on_news_();
    }

    // Telling one member takes a few microseconds; so it takes a processor a part of the time.
    static constexpr std::chrono::microseconds time_to_tell_one{20};
    const ServerOptions& options_;
    const std::function<void()> on_news_;
    mutable std::mutex turn_;              // taken before mutex_, and given back when one has it
    mutable std::shared_mutex mutex_;      // guards the rest
    std::condition_variable_any changed_;  // for claim(): a Pong has come, somebody is gone
    // The last login of each user, from the proof of the password until its thread ends.
    std::map<std::string, SessionPtr> by_name_;
    std::size_t online_ = 0;           // of those, who have not left
    std::vector<SessionPtr> members_;  // those who have shown a card, by id
    Bytes news_;                       // Joined and Left that not all were told yet
    std::vector<SessionPtr> due_;      // who has some in the outbox, and is to be flushed
    Clock::time_point announced_at_{}, announce_at_ = Clock::time_point::max();
    std::uint32_t last_id_ = 0;
};

// The one thread that waits for those who are slow. Whoever finds a member's socket full leaves it
// to the pump, which goes on when the socket takes more, and drops a member whose socket takes
// nothing for `patience`. It also makes the announcements when they are due.
class Pump {
  public:
    // Throws std::system_error if there is no thread for it.
    Pump(Members& members, Milliseconds patience, std::function<void(const std::string&)> log)
        : members_(members), patience_(patience), log_(std::move(log)) {}
    ~Pump() { stop(); }

    void start() {
        thread_ = std::thread([this] { run(); });
    }
    void stop() {
        stopping_ = true;
        waker_.wake();
        if (thread_.joinable()) thread_.join();
    }
    void wake() { waker_.wake(); }  // any thread
    // Any thread: much memory was needed and is free again. When there was no burst for a second,
    // it goes back to the system.
    void note_burst() {
        last_burst_ = Clock::now();
        if (!cleaning_up_.exchange(true)) wake();
    }
    // Any thread: called by Connection::flush.
    void take_over(Session& s) {
        {
            std::lock_guard lock(mutex_);
            new_.push_back(s.shared_from_this());
        }
        wake();
    }

  private:
    void run() noexcept {
        while (!stopping_) {
            try {
                wait_and_write();
            } catch (const std::exception& e) {
                log_(concat("the pump: ", e.what()));  // no memory: perhaps the next time
            }
        }
    }
    void wait_and_write() {
        std::vector<PollEntry> entries{{waker_.handle(), POLLIN, 0}};
        Clock::time_point deadline = members_.next_announcement();
        if (cleaning_up_) deadline = std::min(deadline, last_burst_.load() + rest);
        for (const auto& [session, since] : full_) {
            entries.push_back({session->connection.handle(), POLLOUT, 0});
            deadline = std::min(deadline, since + patience_);
        }
        poll_until(entries, deadline);
        waker_.drain();
        Clock::time_point now = Clock::now();
        auto entry = entries.begin();
        for (auto it = full_.begin(); it != full_.end();) {
            auto [session, since] = *it;
            bool ready = (++entry)->revents != 0;
            if (ready) session->connection.flush_full();  // if it is full again, take_over follows
            if (!ready && now >= since + patience_) {
                log_(members_.remove(*session, "it takes no more data"));
                session->connection.abort();
            }
            it = ready || !session->connection.outbox.is_full() ? full_.erase(it) : std::next(it);
        }
        {
            std::lock_guard lock(mutex_);
            for (SessionPtr& session : new_) full_.insert_or_assign(std::move(session), now);
            new_.clear();
        }
        if (cleaning_up_ && now >= last_burst_.load() + rest) {
            cleaning_up_ = false;
            give_back_free_memory();
        }
        if (now < members_.next_announcement()) return;
        std::vector<SessionPtr> touched;
        members_.announce_now(touched);
        for (const SessionPtr& member : touched) member->connection.flush();
    }

    Members& members_;
    const Milliseconds patience_;
    const std::function<void(const std::string&)> log_;
    static constexpr std::chrono::seconds rest{1};
    Waker waker_;
    std::atomic<bool> stopping_ = false, cleaning_up_ = false;
    std::atomic<Clock::time_point> last_burst_{};
    std::map<SessionPtr, Clock::time_point> full_;  // the thread's: since when each takes nothing
    std::mutex mutex_;                              // guards new_
    std::vector<SessionPtr> new_;
    std::thread thread_;  // joined by stop()
};

}  // namespace detail

class Server {
  public:
    // Listens on its port, locks the data directory, reads the accounts, and reads the key or makes
    // it (which takes a moment). Throws Error or NetworkError; then nothing on the disk has
    // changed.
    explicit Server(ServerOptions options)
        : options_(std::move(options)),
          listener_(options_.bind, options_.port),
          lock_(lock_data_directory(options_.data_directory)),
          accounts_(options_.data_directory / "users.db"),
          key_(load_or_make_key()),
          fake_salt_secret_(key_.derived_secret("chatsecure salts of unknown users")),
          ticket_secret_(key_.derived_secret("chatsecure tickets of known devices")) {
        for (const std::string& address : listener_.addresses())
            info(concat("listening on ", address));
        info(concat("server key ", fingerprint().text()));
        for (const std::string& user : accounts_.users_with_example_password())
            warn(concat("the account \"", user,
                        "\" has the password that users.db.example tells "
                        "everybody. Remove its line from users.db before others can reach this "
                        "server."));
    }
    ~Server() { stop(); }
    Server(const Server&) = delete;
    Server& operator=(const Server&) = delete;

    std::uint16_t port() const { return listener_.port(); }
    Fingerprint fingerprint() const { return key_.public_key().fingerprint(); }

    // Serves until stop(): blocks. Then says goodbye to everybody and joins every thread. Throws
    // std::system_error if the system has not even one thread.
    void run() {
        pump_.start();
        while (!stopping_.load()) {
            try {
                if (std::optional<Listener::Accepted> newcomer = listener_.accept(waker_))
                    admit(std::move(*newcomer));
            } catch (const std::exception& e) {
                warn(e.what());
                std::unique_lock lock(sessions_mutex_);  // let somebody leave before the next try
                session_ended_.wait_for(lock, Milliseconds(50));
            }
            waker_.drain();
            join_finished();
        }
        say_goodbye();
        pump_.stop();
    }

    // Makes run() return soon. Any thread may call it, and a signal handler too.
    void stop() noexcept {
        stopping_.store(true);
        waker_.wake();
    }

    // How many members are online. Any thread.
    std::size_t members() const { return members_.size(); }

    // Adds an account to a data directory that no server is using: throws Error if one is, or if
    // the name is taken or bad, or the password too weak. Blocks for the slow hash.
    static void add_account(const std::filesystem::path& data_directory, std::string_view name,
                            ByteView password, std::uint32_t iterations = default_iterations) {
        std::string user = fold_name(name);
        check_new_password(password);
        DirectoryLock lock = lock_data_directory(data_directory);
        AuthStore accounts(data_directory / "users.db");
        Bytes salt = random_bytes(16);
        Secret<32> salted = pbkdf2_sha256(password, salt, iterations);
        if (!accounts.add({user, make_verifier(salted, salt, iterations), {}, rfc3339_now()}))
            throw Error(concat("The name \"", user, "\" is taken already."));
    }

  private:
    using Session = detail::Session;
    using SessionPtr = detail::SessionPtr;
    using Stage = Session::Stage;
    using Refusal = detail::Refusal;

    // ---- Start ----------------------------------------------------------------------------------

    static DirectoryLock lock_data_directory(const std::filesystem::path& directory) {
        make_private_directory(directory);
        if (!detail::may_write_into(directory))
            throw Error(concat("The data directory ", directory.string(), " cannot be written: ",
                               system_reason(), ". Choose another with --data."));
        return DirectoryLock(directory, false,
                             concat("Another server uses the data directory ", directory.string(),
                                    ". Stop it, or choose another directory with --data."));
    }

    // The private key stays for ever: the clients know the server by it. The public one lies beside
    // it for those who want to hand it out.
    RsaPrivateKey load_or_make_key() {
        std::filesystem::path private_path = options_.data_directory / "server_private.pem";
        std::filesystem::path public_path = options_.data_directory / "server_public.pem";
        std::optional<RsaPrivateKey> key = RsaPrivateKey::load(private_path, {});
        if (!key) {
            if (!options_.new_key && std::filesystem::exists(public_path))
                throw Error(concat("The server's key ", private_path.string(), " is missing, but ",
                                   public_path.string(),
                                   " is there: this server had one, and with another its clients "
                                   "will refuse it. Restore the file, or give --new-key."));
            info(concat("making a new server key of ", options_.rsa_bits,
                        " bits: ", private_path.string()));
            key = RsaPrivateKey::generate(options_.rsa_bits);
            key->save(private_path, {}, 0);
        }
        std::string pem = key->public_key().pem();
        std::optional<SecretBytes> there = read_file(public_path, max_key_file_bytes);
        if (!there || as_text(*there) != pem)
            write_file(public_path, as_bytes(pem), FileMode::readable_by_all);
        return std::move(*key);
    }

    // ---- Connections come and go ----------------------------------------------------------------

    void admit(Listener::Accepted newcomer) {
        auto session =
            std::make_shared<Session>(std::move(newcomer.socket), newcomer.from, options_);
        session->connection.on_full = [this, s = session.get()] { pump_.take_over(*s); };
        std::lock_guard lock(sessions_mutex_);
        if (!make_room_for(*session)) {
            warn(concat("refused ", session->address, ": too many connections"));
            return;
        }
        sessions_.push_back(session);
        try {
            session->login_thread = std::thread([this, session] { let_in(session); });
        } catch (const std::exception& e) {
            warn(concat("refused ", session->address, ": no thread for it: ", e.what()));
            sessions_.pop_back();
        }
    }

    // Sees to it that there is a slot for another stranger. False if there is none for this one.
    // Under sessions_mutex_.
    bool make_room_for(const Session& newcomer) {
        std::size_t strangers = 0, from_there = 0;
        SessionPtr first, first_connecting;  // sessions_ begins with the oldest
        for (const SessionPtr& other : sessions_) {
            Stage stage = other->stage;
            if (stage == Stage::member || stage == Stage::left) continue;
            if (other->host == newcomer.host) ++from_there;
            if (other->dropped || other->finished) continue;
            ++strangers;
            if (!first && stage != Stage::logging_in) first = other;
            if (!first_connecting && stage == Stage::connecting) first_connecting = other;
        }
        // Those that were dropped have a thread until it has noticed, so there is a bound for all.
        if (from_there >= options_.max_logins_per_address ||
            sessions_.size() >= 2 * (options_.max_clients + options_.max_strangers))
            return false;
        if (strangers < options_.max_strangers) return true;
        const SessionPtr& oldest = first_connecting ? first_connecting : first;
        if (!oldest) return false;
        oldest->dropped = true;
        oldest->connection.abort();
        return true;
    }

    void join_finished() {
        std::list<SessionPtr> finished;
        {
            std::lock_guard lock(sessions_mutex_);
            for (auto it = sessions_.begin(); it != sessions_.end();) {
                auto here = it++;
                if ((*here)->finished) finished.splice(finished.end(), sessions_, here);
            }
        }
        for (const SessionPtr& session : finished)
            for (std::thread* thread : {&session->login_thread, &session->thread})
                if (thread->joinable()) thread->join();
    }

    void say_goodbye() {
        info("stopping");
        std::unique_lock lock(sessions_mutex_);
        for (const SessionPtr& session : sessions_) {
            if (session->stage != Stage::member) {
                session->connection.abort();
                continue;
            }
            session->connection.outbox.push_control(
                Goodbye{GoodbyeReason::none, "The server is stopping."});
            session->connection.outbox.finish();
        }
        // Not before: who hears it leaves, and nobody else should be told of that.
        for (const SessionPtr& session : sessions_) session->connection.flush();
        // The clients close their end when they see the goodbye. Those that do not are cut off.
        auto all_finished = [&] {
            return std::all_of(sessions_.begin(), sessions_.end(),
                               [](const SessionPtr& s) { return s->finished.load(); });
        };
        session_ended_.wait_for(lock, Milliseconds(2000), all_finished);
        for (const SessionPtr& session : sessions_) session->connection.abort();
        session_ended_.wait(lock, all_finished);
        lock.unlock();
        join_finished();
        info("stopped");
    }

    // ---- One connection, from beginning to end --------------------------------------------------

    // Its first thread: handshake and login. What these leave behind in a thread (pages of the
    // stack, OpenSSL's random generators, the allocator's caches: 25 KiB) ends with it; who is
    // logged in gets a fresh one.
    void let_in(const SessionPtr& session) noexcept {
        end(session, [&] {
            greet(*session);
            log_in(session);
            session->thread = std::thread([this, session] { serve(session); });
            return std::string();
        });
    }
    // Its second one: everything after that.
    void serve(const SessionPtr& session) noexcept {
        std::thread before;
        {
            std::lock_guard lock(sessions_mutex_);  // now admit() has written it down
            before = std::move(session->login_thread);
        }
        before.join();
        end(session, [&] { return take_part(session); });
    }

    // Does the work of a thread, and ends the session with what it returns, if it is not empty: how
    // it ended, for the log. Nothing that happens to a connection may leave its thread, not even
    // what nobody has thought of.
    template <class Work>
    void end(const SessionPtr& session, const Work& work) noexcept {
        try {
            std::string how;
            bool refused = true;
            Goodbye last_words{GoodbyeReason::none, "Goodbye."};
            try {
                how = work();
                if (how.empty()) return;
            } catch (const Refusal& e) {
                last_words = {e.reason, how = e.what()};
            } catch (const ProtocolError& e) {
                last_words = {GoodbyeReason::broke_protocol, how = e.what()};
            } catch (const std::exception& e) {
                session->connection.abort();  // what still waits for it must not keep it here
                how = e.what();
                // Who meets us for the first time goes, to ask its user about our key.
                refused = dynamic_cast<const NetworkError*>(&e) == nullptr ||
                          dynamic_cast<const TimedOut*>(&e) != nullptr;
            }
            flush_touched(*session);
            info(members_.remove(*session, how, refused));
            // Now nothing comes behind the last words.
            if (session->connection.is_secure()) session->connection.send(last_words);
        } catch (...) {
            session->connection.abort();
        }
        session->connection.close(options_.write_timeout, Milliseconds(1000));
        members_.forget(session);
        std::lock_guard lock(sessions_mutex_);  // so that nobody misses the notification
        session->finished = true;
        session_ended_.notify_all();
        waker_.wake();
    }

    // The handshake of chapter 5, and Welcome.
    void greet(Session& s) {
        Clock::time_point deadline = Clock::now() + options_.handshake_timeout;
        ServerHandshake handshake(key_, s.connection.receive_frame(deadline));
        s.connection.send_frame(handshake.hello(), options_.write_timeout);
        HopKeys keys =
            finish_handshake(handshake, s.connection.receive_frame(deadline), s.connection.trace());
        s.connection.secure(std::move(keys.client_to_server), std::move(keys.server_to_client));
        s.channel_binding = keys.channel_binding;
        s.stage = Stage::stranger;
        s.connection.send(Welcome{std::string(version),
                                  options_.registration_open ? std::uint8_t{1} : std::uint8_t{0}});
    }

    // The expensive part, for as many at once as there are processors.
    HopKeys finish_handshake(const ServerHandshake& handshake, ByteView frame3,
                             const Tracer& trace) {
        handshakes_.acquire();
        detail::AtExit release([&] { handshakes_.release(); });
        return handshake.receive_key(frame3, trace);
    }

    // Messages until somebody is logged in and has shown a card. One wrong password ends it.
    void log_in(const SessionPtr& session) {
        Session& s = *session;
        Clock::time_point deadline = Clock::now() + options_.login_timeout;
        Message message = s.connection.expect(deadline);
        if (message.type == RegisterAccount::type) {
            register_account(s, from_wire<RegisterAccount>(message.body));
            message = s.connection.expect(deadline);
        }
        check_login(session, from_wire_as<Scram>(message), deadline);
        publish(s, from_wire_as<PublishCard>(s.connection.expect(deadline)).card);
    }

    void register_account(Session& s, const RegisterAccount& request) {
        if (!options_.registration_open)
            throw Refusal(
                GoodbyeReason::registration_closed,
                "This server does not take registrations. Ask its operator for an account.");
        Account account;
        try {
            account = {fold_name(request.user), ScramVerifier::parse(request.verifier),
                       RsaPublicKey::from_der(request.identity).der(), rfc3339_now()};
        } catch (const Error& e) {
            throw Refusal(GoodbyeReason::bad_account, e.what());
        }
        // Each account costs a rewrite of users.db: whoever makes hundreds is made to wait.
        wait_for_turn(s, registrations_.take(s.host, Clock::now()));
        bool added = false;
        try {
            if (accounts_.size() >= options_.max_accounts)
                throw Error("There are too many accounts.");
            added = accounts_.add(account);
        } catch (const Error& e) {
            warn(concat("cannot register \"", account.user, "\": ", e.what()));
            throw Refusal(
                GoodbyeReason::server_trouble,
                "The server cannot store new accounts at the moment. Its operator can see "
                "the reason in its log.");
        }
        if (!added)
            throw Refusal(GoodbyeReason::name_taken,
                          concat("The name \"", account.user,
                                 "\" is taken. Choose another; or, if it is yours, log in "
                                 "instead of registering."));
        info(concat("registered \"", account.user, "\" from ", s.address));
        s.connection.send(Registered{});
    }

    void check_login(const SessionPtr& session, const Scram& first, Clock::time_point deadline) {
        Session& s = *session;
        ScramServer scram(first.text, s.channel_binding);
        std::optional<Account> account = accounts_.find(scram.user());
        ScramVerifier verifier = account ? account->verifier : unknown_user(scram.user());
        const Secret<32> ticket = ticket_for(scram.user(), verifier);
        const bool known = equal_in_constant_time(first.ticket, ticket.view());
        const std::string account_key = (known ? "ticket " : "user ") + scram.user();
        begin_try(s, account_key, known);
        s.connection.send(Scram{scram.challenge(std::move(verifier))});

        std::optional<std::string> server_final =
            scram.check(from_wire_as<Scram>(s.connection.expect(deadline)).text);
        if (!server_final || !account)
            throw Refusal(GoodbyeReason::bad_login, "The name or the password is wrong.");
        account_tries_.refill(account_key);
        // Of the address only what this try has taken: an attacker has an account of his own.
        if (!known) address_tries_.give_back(s.host);
        info(members_.claim(session, scram.user()));
        Bytes identity;
        if (!account->identity.empty()) identity = to_bytes(sha256(account->identity));
        s.connection.send(LoginDone{*server_final, s.id, identity, to_bytes(ticket.view())});
    }

    // Takes the tokens of a try to log in, and waits for its turn. Throws Refusal.
    void begin_try(Session& s, const std::string& account_key, bool known) {
        Clock::time_point now = Clock::now();
        std::optional<Milliseconds> of_address =
            known ? Milliseconds(0) : address_tries_.take(s.host, now);
        if (!of_address) wait_for_turn(s, of_address);
        std::optional<Milliseconds> of_account = account_tries_.take(account_key, now);
        if (!of_account && !known) address_tries_.give_back(s.host);
        wait_for_turn(s, of_account ? std::max(of_address, of_account) : of_account);
    }
    void wait_for_turn(Session& s, std::optional<Milliseconds> wait) {
        if (!wait)
            throw Refusal(GoodbyeReason::too_many_tries,
                          "There were too many tries. Wait a minute, then try again.");
        s.connection.pause(*wait);
    }
    Secret<32> ticket_for(const std::string& user, const ScramVerifier& verifier) const {
        return hmac_sha256(ticket_secret_.view(),
                           as_bytes(concat("ticket ", user, as_text(verifier.stored_key))));
    }

    // What an unknown user's entry would look like: the same each time, and no password fits. (Who
    // has accounts with other iteration counts than the default, made elsewhere, shows by the count
    // that they exist.)
    ScramVerifier unknown_user(const std::string& user) const {
        Secret<32> salt = hmac_sha256(fake_salt_secret_.view(), as_bytes("salt " + user));
        Secret<32> stored = hmac_sha256(fake_salt_secret_.view(), as_bytes("stored " + user));
        return {
            default_iterations, to_bytes(salt.view().first(16)), to_fixed<32>(stored.view()), {}};
    }

    // The server does not judge cards: the clients do, each for itself (chapter 8). It looks at
    // what it writes down, the identity that an account has, and only at one that is new to it.
    void publish(Session& s, ByteView bytes) {
        if (bytes.size() > max_card_bytes)  // so that it fits into every answer to GetCard
            throw ProtocolError("Received a key card that is too large.");
        s.card = to_bytes(bytes);
        Card card = decode<Card>(bytes, "a key card");
        std::optional<Account> account = accounts_.find(s.user);
        if (!account || account->identity == card.identity_der) return;
        CheckedCard checked(bytes, s.user);
        if (!account->identity.empty())
            warn(concat("\"", s.user, "\" comes with another identity key than before: now ",
                        checked.fingerprint.text()));
        // Who comes with another one at each login would have users.db rewritten each time.
        if (!new_identities_.take(s.user, Clock::now())) return;
        try {
            accounts_.set_identity(s.user, checked.identity.der());
        } catch (const Error& e) {
            warn(e.what());  // the record is for the operator only: no reason to refuse the user
        }
    }

    // ---- A member talks -------------------------------------------------------------------------

    // Returns why it ended.
    std::string take_part(const SessionPtr& session) {
        Session& s = *session;
        s.connection.set_patience(options_.ping_after);
        std::size_t online = members_.join(session);
        s.connection.flush();
        info(concat("\"", s.user, "\" joined from ", s.address, " as login ",
                    static_cast<std::uint32_t>(s.id), "; online: ", online));
        for (;;) {
            while (std::optional<Message> message = s.connection.next()) {
                if (message->type == Quit::type) {
                    from_wire<Quit>(message->body);
                    return "said goodbye";
                }
                ++s.handled;
                handle(s, *message);
                if (s.unflushed > max_unflushed) flush_touched(s);
            }
            flush_touched(s);
            s.connection.wait(Clock::time_point::max());
        }
    }

    // Sends what this thread has put into the outboxes of others. It does so before it waits for
    // anything, and after max_unflushed deliveries, so that a flood does not delay its beginning.
    void flush_touched(Session& s) {
        for (const SessionPtr& other : s.touched) other->connection.flush();
        s.touched.clear();
        // Last, so that what is acknowledged has been sent as far as the sockets take it.
        if (auto tag = std::exchange(s.taken, std::nullopt)) s.connection.send(Taken{*tag});
        if (std::exchange(s.unflushed, 0) > large_burst) pump_.note_burst();
    }

    void handle(Session& s, const Message& message) {
        std::size_t text = 0;  // bytes of chat in it
        switch (message.type) {
            case Send::type: {
                Send send = from_wire<Send>(message.body);
                relay(s, send);
                if (send.lane == Lane::bulk && send.payload.size() >= large_chunk) {
                    charge(s, 1.0 / 16);
                    return;
                }
                text = send.payload.size();
                break;
            }
            case Fanout::type: {
                Fanout fanout = from_wire<Fanout>(message.body);
                relay_to_room(s, fanout);
                text = fanout.text.size();
                break;
            }
            case GetCard::type:
                send_card(s, from_wire<GetCard>(message.body).id);
                break;
            case Ping::type:
                s.connection.send(Pong{from_wire<Ping>(message.body).number});
                break;
            case Pong::type:
                from_wire<Pong>(message.body);
                members_.note_pong();
                break;
            default:
                throw ProtocolError(concat("Received a message of the unknown type ",
                                           static_cast<int>(message.type), "."));
        }
        // A message costs one token, and one more for each 256 bytes of text. The tokens for one go
        // are worth less than a member's queue holds, so who reads along at all loses nothing.
        charge(s, 1 + static_cast<double>(text) / 256);
    }
    // File data has a brake of its own, the receiver's credit (chapter 9), so that a large chunk
    // costs little; but nothing that another member has to handle is free.
    void charge(Session& s, double cost) {
        Milliseconds wait = s.bucket.take(cost, Clock::now());
        if (wait.count() == 0) return;
        flush_touched(s);
        s.connection.pause(wait);
    }

    void relay(Session& s, const Send& send) {
        if (send.lane != Lane::interactive && send.lane != Lane::bulk)
            throw ProtocolError("Received a payload for a lane that does not exist.");
        SessionPtr to;
        Outbox::Result result = Outbox::Result::closed;
        const Delivered delivered{s.id, send.lane, send.payload};
        {
            detail::Members::List members = members_.list_for(s);
            if (auto found = members.find(send.to); found != members.all.end()) {
                to = *found;
                result = to->connection.outbox.push(send.lane, delivered);
            }
        }
        // Somebody has filled that bulk lane against the rules of chapter 9. All who write to it
        // wait for a moment, so that it ends no transfer of anybody else.
        for (auto until = Clock::now() + options_.bulk_patience;
             result == Outbox::Result::refused && send.lane == Lane::bulk &&
             Clock::now() < until;) {
            flush_touched(s);
            to->connection.outbox.wait_for_bulk_room(
                options_.bulk_queue_bound - std::min(options_.bulk_queue_bound, max_record_bytes),
                until);
            result = to->connection.outbox.push(send.lane, delivered);
        }
        // Whoever wrote to it has found its connection broken before its own thread did.
        if (to && result == Outbox::Result::closed)
            info(members_.remove(*to, "its connection broke"));
        if (result <= Outbox::Result::queued)  // also if another thread is going to: it may be busy
            s.touched.push_back(to);
        else if (result == Outbox::Result::refused)
            s.connection.send(Undelivered{send.to, send.tag});
        ++s.unflushed;
        if (options_.log_relayed) log_relayed(s, to ? to->user : "nobody", send.payload);
    }

    void relay_to_room(Session& s, const Fanout& fanout) {
        if (fanout.wrapped_keys.size() % Fanout::entry_bytes != 0)
            throw ProtocolError("Received a room message with a broken list of keys.");
        // Everything but the wrapped key is the same for all: it is encoded once.
        Bytes shared = to_wire(RoomDelivered{s.id, fanout.text, {}});
        shared.resize(shared.size() - wrapped_key_bytes);
        Reader entries(fanout.wrapped_keys, "a list of keys");
        std::vector<LoginId> busy;
        std::size_t reached = 0;
        {
            detail::Members::List members = members_.list_for(s);
            auto member = members.all.begin(), end = members.all.end();
            for (LoginId id{}, before{}; !entries.empty(); before = id) {
                entries(id);
                ByteView wrapped_key = entries.raw(wrapped_key_bytes);
                if (id <= before)  // ascending, so nobody can be flooded by naming him often
                    throw ProtocolError("Received a room message whose keys are out of order.");
                if (member == end || (*member)->id != id) member = members.find(id);
                if (member == end) continue;  // left in the meantime
                Outbox::Result result =
                    (*member)->connection.outbox.push(Lane::interactive, shared, wrapped_key);
                if (result == Outbox::Result::due) s.touched.push_back(*member);
                if (result == Outbox::Result::refused) busy.push_back(id);
                ++reached;
                ++member;
            }
        }
        s.unflushed += reached;
        for (LoginId id : busy) s.connection.outbox.push_control(Undelivered{id, fanout.tag});
        // Not while we stop: then some outboxes take nothing any more.
        if (!stopping_.load()) s.taken = fanout.tag;
        if (options_.log_relayed) log_relayed(s, concat("the room (", reached, ")"), fanout.text);
    }

    void send_card(Session& s, LoginId id) {
        {
            detail::Members::List members = members_.list();
            auto found = members.find(id);  // no answer if it has left: the asker hears that
            if (found != members.all.end())
                s.connection.outbox.push_control(CardOf{id, (*found)->card});
        }
        s.connection.flush();
    }

    // ---- The log --------------------------------------------------------------------------------

    void info(const std::string& line) {  // nothing if it is empty
        if (!line.empty()) options_.log(LogLevel::info, line);
    }
    void warn(const std::string& line) { options_.log(LogLevel::warning, line); }
    // All that the server can know about a message.
    void log_relayed(const Session& from, const std::string& to, ByteView payload) {
        options_.log(
            LogLevel::relayed,
            concat(from.user, " -> ", to, ": ", payload.size(), " bytes ",
                   to_hex(payload.first(std::min<std::size_t>(payload.size(), 24))), "..."));
    }

    static constexpr std::size_t large_chunk = 16 * 1024;
    static constexpr std::size_t max_unflushed = 32 * 1024;  // deliveries: some milliseconds
    static constexpr std::size_t large_burst = 256;          // one that is worth cleaning up after

    ServerOptions options_;
    Listener listener_;
    DirectoryLock lock_;
    AuthStore accounts_;
    RsaPrivateKey key_;
    Secret<32> fake_salt_secret_, ticket_secret_;
    TokenBuckets account_tries_{0.25, 3};
    // More than may be under way at once: so no right password from there is refused for others.
    TokenBuckets address_tries_{0.25, static_cast<double>(options_.max_logins_per_address + 22)};
    TokenBuckets registrations_{0.25, 100};
    TokenBuckets new_identities_{1.0 / 60, 3, std::chrono::seconds(0)};
    std::counting_semaphore<> handshakes_{
        static_cast<std::ptrdiff_t>(std::max(1U, std::thread::hardware_concurrency()))};
    Waker waker_;
    std::atomic<bool> stopping_ = false;
    detail::Members members_{options_, [this] { pump_.wake(); }};
    detail::Pump pump_{members_, options_.write_timeout, [this](const std::string& l) { info(l); }};

    mutable std::mutex sessions_mutex_;      // guards sessions_
    std::condition_variable session_ended_;  // for run() and say_goodbye()
    std::list<SessionPtr> sessions_;         // every connection that has a thread
};

// ---- Try it -------------------------------------------------------------------------------------
//
// Break: throttle-not-asked (passwords can be guessed as fast as one likes) and live-one-pushed-out
// (who logs in again pushes the live connection out).
//
// Write a server that refuses MORE THAN THREE members from one address (or another number, with 0
// for no limit):
//
//      std::size_t max_members_per_address = 0;            // in ServerOptions
//
// The fourth is refused as by a full server, with the number in the sentence; when one of the three
// leaves, the next one gets in; other addresses do not notice. Where must it be counted, so that
// two who come at the same instant cannot both be the third?
// Green: exercise: three

// =================================================================================================
//  Chapter 12. The client
// =================================================================================================
//
// The engine behind a front end: a terminal, a window, a test. A front end posts commands and takes
// events; it never waits for the network, the disk or an RSA operation. What goes wrong where it
// does: a window that stands still while a name is looked up, and a line that was typed while the
// connection was away, of which nobody knows whether it was ever sent.
//
//      front end -- post(Say{"hi"}) --> [ Mailbox ] --+
//                                                     +--> engine --> outbox --> socket
//      socket ----------------------------------------+      |          ^
//                                                            v          | (chunks)
//      front end <-- next_event() <--- [ Mailbox ] <-----  events    a thread for each file
//
// The engine is one thread. It sleeps in poll(), for its socket and for a Waker, which whoever puts
// something into the Mailbox wakes; then it handles what has come from the server and from the
// front end, sends what it has to say, and sleeps again.
//
// The engine thread alone knows the conversation's state: the people, their keys, the pins. State
// that one thread owns needs no lock, and everything happens in an order that one can follow.
//
// The order also answers the hard question of this chapter: a message for the room needs the card
// of everybody in it, and cards come later than they are asked for. A command that has to wait
// becomes a JOB, and the engine tries again after each arrival. What the user writes is kept by
// itself (see Written), from the moment it is typed until it has been delivered or given up:
//
//      waiting --- sealed and sent ---> sent --- receipt (in private) or Taken (room) ---> done
//         ^                              |
//         +--- its reader has gone, or --+        and from both: --- given up ---> failed
//              the connection is lost
//
// Who reads the same reads it in the order in which it was written: the room waits for nobody
// longer than some seconds, and a private message for earlier ones to the same person or the room.
// When the connection comes back after a restart of the server, the others are still on their way;
// so what is written then waits until those who were there are back, or for those seconds.
//
// A receipt is sent when the FRONT END has dealt with a message, which the engine learns when it
// asks for the event after that. A program that is killed before has confirmed nothing. What comes
// from somebody who is ignored is not confirmed either; their program may send it again, and so its
// id is remembered: it stays hidden.
//
// Complaints. Another member can send nonsense as fast as the server lets it. So what is wrong with
// what somebody sends is told a few times, then only when its number has become ten times as large,
// and not at all of somebody who is ignored; and no complaint is a failure of ours.
//
// A file that is on its way has a thread that reads or writes it (chapter 9). A sender's thread
// puts its chunks into the outbox and sends like everybody else; everything else about a file is
// said and decided in the engine's thread, which these threads only wake.
//
// Locks. The Mailbox has one mutex, and front ends sleep on it until there is an event or room for
// a command; the engine does not. Each outbox has one (chapter 10), on which a file's thread sleeps
// until its lane has room. Each file's thread has one for its requests, and sleeps on it; what they
// all answer is under another one (chapter 9). What is sealed for one bulk lane is queued under a
// lock as well, so that it is queued in the order of its numbers. The Mailbox's (in stop()) and
// this one are held while an Outbox's is taken; the others are taken alone.
//
// When the connection is lost, the engine connects again, with growing pauses, until it succeeds or
// is told to stop; what is written meanwhile waits. A server that comes back with another key ends
// it.
//
// What it keeps on disk, below the directory `home` (mode 0700):
//
//      known_servers                        HOST:PORT SHA256:<fingerprint>     one line a server
//      servers/<server>/<user>/identity.pem the user's identity key, encrypted with the password
//      servers/<server>/<user>/known_users  the pins of chapter 8
//      servers/<server>/<user>/login        iterations and ticket of the last login (chapter 11)
//
// <server> is the beginning of the server key's fingerprint, in hexadecimal: the same server under
// two addresses is one server, and two servers that have the same address in turn are two.
//
// What it does not protect against: programs of the same user, which can read what we read and type
// what we type; and the person in front of it, who can accept a key without comparing it.

// ---- Commands: from a front end to the engine ---------------------------------------------------

struct Say {  // to everybody
    std::string text;
};
struct Tell {  // to one person
    std::string user, text;
};
struct ListPeople {};  // answered by People
// Answered by SafetyNumber. A click and a change of identity may cross: `compared` says whose
// number the user had in view (if it is not given: what was told last), and another one is not
// confirmed.
struct Verify {
    std::string user;
    std::optional<bool> agree{};  // the two numbers: true is remembered, false takes that back
    std::optional<Fingerprint> compared{};
};
struct Trust {  // accept the identity that `user` has now; if `compared` is given, only that one
    std::string user;
    std::optional<Fingerprint> compared{};
};
struct Ignore {  // hide what `user` writes, or show it again
    std::string user;
};
struct AcceptServerKey {  // the answer to ServerKeyUnknown
    bool accept = false;
};
struct SendFile {  // offer them, all or none; chapter 9 has the events that follow
    std::string user;
    std::vector<std::filesystem::path> paths;
};
struct AcceptFile {
    unsigned number = 0;  // 0: the only one that waits
    std::string name{};   // other than the offered one, or empty
};
struct DeclineFile {
    unsigned number = 0;
};
struct CancelFile {  // in any state, of either direction
    unsigned number = 0;
};
struct ListFiles {};             // answered by FileList
struct LimitRoom {               // who reads what is said to everybody:
    bool verified_only = false;  // only people whose safety number was compared
};
// Say goodbye when everything before it was taken and delivered. What is still open when nothing
// has moved for `patience` is named (DeliveryChanged) and given up. A second one replaces the
// first.
struct Leave {
    bool after_files = false;  // wait for every file that is on its way, too
    Milliseconds patience{3'000};
};
using Command =
    std::variant<Say, Tell, ListPeople, Verify, Trust, Ignore, LimitRoom, SendFile, AcceptFile,
                 DeclineFile, CancelFile, ListFiles, AcceptServerKey, Leave>;

// ---- Events: from the engine to a front end -----------------------------------------------------
//
// Texts of other people, and sentences that contain some, are as they came: a front end passes
// them through visible() before it shows them.

struct Connecting {
    std::string server;
};
struct ServerKeyUnknown {  // first contact: post AcceptServerKey
    std::string server;
    Fingerprint fingerprint;
};
struct MakingIdentity {};  // takes a moment
struct LoggedIn {
    std::string user;
    std::string server;
    Fingerprint server_key;
    std::filesystem::path identity_file;
    std::vector<std::string> others;  // who is online
    bool again = false;               // after a lost connection
};
struct ConnectionLost {
    std::string reason;
    Milliseconds retry_in{};
};
struct PersonJoined {
    std::string user;
};
struct PersonLeft {
    std::string user;
};
// A message, ours as soon as it is written. `id` is the number that DeliveryChanged has for ours.
struct RoomMessage {
    std::string from, text;
    bool own = false;
    std::uint64_t id = 0;
};
struct PrivateMessage {
    std::string peer;  // the other person, whoever wrote it
    std::string text;
    bool own = false;
    std::uint64_t id = 0;
};
// What has become of a message that we wrote.
enum class Delivery : std::uint8_t {
    waiting,    // `reason` says for what: the connection, or its reader, is not there
    sent,       // in private: it is on its way; to everybody: the server has put it into each queue
    delivered,  // in private: its reader's program has shown it
    failed,     // it will not be delivered: `reason` says why
};
struct DeliveryChanged {
    std::uint64_t id = 0;
    std::string to, text;  // `to` is empty for a message to everybody
    Delivery state{};
    std::string reason{};
};
struct MessagesLost {  // the server or the network swallowed some
    std::string from;
    std::uint64_t count = 0;
};
struct Complaint {  // about what somebody else sent: nothing that we asked for has failed
    std::string user, text;
};
struct IdentityReplaced {  // our account had another identity: others will have to trust this one
    Fingerprint now;
};
struct IdentityPinned {  // met for the first time
    std::string user;
    Fingerprint fingerprint;
};
struct IdentityChanged {  // nothing is sent to or shown from `user` until Trust
    std::string user;
    Fingerprint pinned, seen;
};
struct SafetyNumber {
    std::string user, digits;
    Fingerprint mine, theirs;
    bool verified = false;
};
// What the key card of somebody's login says of who they are.
enum class Standing : std::uint8_t {
    unknown,  // it was not needed yet
    trusted,
    changed,  // another identity than before, or an old card: nothing passes until Trust
    refused,  // no valid card: nothing passes
};
inline bool may_pass(Standing standing) { return standing <= Standing::trusted; }

struct Person {
    std::string user;
    Standing standing{};
    bool self = false, verified = false, ignored = false;
};
struct People {
    std::vector<Person> people;
};
// Perhaps something of this is new: told behind LoggedIn and PersonJoined for each who is here, and
// after whatever changes it.
struct PersonChanged {
    Person now;
};
struct Notice {
    std::string text;
};
struct Problem {  // a command that could not be done
    std::string text;
};
enum class StopReason {
    left,  // as asked
    cannot_connect,
    login_refused,
    server_key_unknown,  // and not accepted
    server_key_changed,
    server_distrusted,  // it could not prove that it has its key, or knows the account
    local_trouble,      // an identity file that does not open, a directory that cannot be written
};
struct Stopped {  // the last event
    StopReason reason{};
    std::string sentence;
};

struct Event {
    std::chrono::system_clock::time_point time;
    std::variant<Connecting, ServerKeyUnknown, MakingIdentity, LoggedIn, ConnectionLost,
                 PersonJoined, PersonLeft, RoomMessage, PrivateMessage, DeliveryChanged,
                 MessagesLost, Complaint, IdentityReplaced, IdentityPinned, IdentityChanged,
                 SafetyNumber, People, PersonChanged, FileEvent, FileList, Notice, Problem, Stopped>
        what;
};

// ---- The servers that we know -------------------------------------------------------------------

// The file known_servers. Several clients may share it, so it is read and written under a lock.
class KnownServers {
  public:
    explicit KnownServers(std::filesystem::path home)
        : home_(std::move(home)), path_(home_ / "known_servers") {}

    // The pinned fingerprint of "host:port". Throws Error for a damaged file.
    std::optional<Fingerprint> find(const std::string& server) const {
        for (const auto& [name, fingerprint] : read())
            if (name == server) return fingerprint;
        return std::nullopt;
    }
    // Pins a server, or replaces its pin.
    void pin(const std::string& server, const Fingerprint& fingerprint) const {
        make_private_directory(home_);
        DirectoryLock lock(
            home_, true,
            concat("Another program uses the directory ", home_.string(),
                   " and does not let go of it. Stop it, or choose another with --home."));
        std::map<std::string, Fingerprint> pins = read();
        pins[server] = fingerprint;
        std::string content;
        for (const auto& [name, pinned] : pins) content += concat(name, " ", pinned.text(), "\n");
        write_file(path_, as_bytes(content), FileMode::owner_only);
    }
    const std::filesystem::path& path() const { return path_; }

  private:
    std::map<std::string, Fingerprint> read() const {
        std::map<std::string, Fingerprint> pins;
        read_lines(path_, std::size_t{1} << 20, "Correct or remove the line.",
                   [&](const std::vector<std::string>& words) {
                       if (words.size() != 2) throw Error("it is damaged.");
                       pins[words[0]] = Fingerprint::parse(words[1]);
                   });
        return pins;
    }
    std::filesystem::path home_, path_;
};

// The user's data directory, as the system has it: chapter 14. Empty if there is none (never one
// below the current directory: the identity would then depend on where a program is started).
inline std::filesystem::path default_home();

// Where people look for what they have received: the desktop's folder, or the directory "downloads"
// where there is none.
inline std::filesystem::path default_downloads();

struct ClientOptions {
    std::string host = "localhost";
    std::uint16_t port = 5000;
    std::string user{};
    SecretBytes password{};
    bool register_account = false;  // make the account first
    std::filesystem::path home = default_home();
    std::optional<Fingerprint> server_key{};  // this one and no other; it is pinned
    bool accept_new_server = false;           // pin an unknown server without asking
    bool ask_about_server = false;            // an unknown server: ServerKeyUnknown, else stop
    bool verified_room = false;               // as LimitRoom{true}
    int rsa_bits = default_rsa_bits;          // of a new identity
    std::uint32_t iterations = default_iterations;  // of a new account, and of its identity file
    Milliseconds connect_timeout{10'000};
    Milliseconds answer_timeout{60'000};  // for handshake and login together
    Milliseconds ping_after{45'000};      // of silence
    Milliseconds first_pause{500};        // before connecting again; then doubled
    Milliseconds longest_pause{30'000};
    int reconnect_tries = 0;               // 0: for ever
    Milliseconds regather{5'000};          // after a loss, for those who were there to come back
    Milliseconds return_patience{60'000};  // for one who left to come back and read
    FileTransfers::Options files{"downloads"};  // where received files go, and more
    std::function<void()> on_event = [] {};  // called in the engine's thread after each event; it
                                             // wakes somebody, and does nothing else
    Tracer trace{};                          // any thread of the engine's calls it
};

namespace detail {

// The end of the engine, with its reason.
struct Halt : Error {
    StopReason reason;
    Halt(StopReason why, const std::string& sentence) : Error(sentence), reason(why) {}
};

// What passes between the engine and everybody else: commands in, events out, and "stop". Any
// thread, unless it says otherwise. The engine waits in poll(), for its socket and for `waker`;
// a front end waits here.
class Mailbox {
  public:
    explicit Mailbox(std::function<void()> on_event) : on_event_(std::move(on_event)) {}

    // ---- For a front end: see Client ------------------------------------------------------------

    bool post(Command command, bool may_wait) {
        {
            std::unique_lock lock(mutex_);
            auto room = [&] { return commands_.size() < max_commands || ended_; };
            if (may_wait) changed_.wait(lock, room);
            if (ended_ || !room()) return false;
            commands_.push_back(std::move(command));
        }
        waker.wake();
        return true;
    }
    std::size_t waiting() const {
        std::lock_guard lock(mutex_);
        return commands_.size() + unsent;
    }
    std::optional<Event> next_event(std::optional<Milliseconds> patience) {
        std::unique_lock lock(mutex_);
        dealt_with_ = taken_;  // whoever asks for another event has dealt with those before
        if (dealt_with_ >= awaited_) {
            awaited_ = UINT64_MAX;
            waker.wake();
        }
        auto ready = [&] { return !events_.empty() || ended_; };
        if (patience)
            changed_.wait_for(lock, *patience, ready);
        else
            changed_.wait(lock, ready);
        if (events_.empty()) return std::nullopt;
        Event event = std::move(events_.front());
        events_.pop_front();
        ++taken_;
        bytes_ -= size_of(event);
        bool room_again = full_ && has_room();
        full_ = full_ && !room_again;
        lock.unlock();
        if (room_again) waker.wake();
        return event;
    }
    void stop() noexcept {
        {
            std::lock_guard lock(mutex_);
            stopping_ = true;
            if (connection_) connection_->abort();
        }
        stop_waker.wake();
        waker.wake();
    }

    // ---- For the engine -------------------------------------------------------------------------

    Waker waker;       // awake: there may be a command, room for events, or something of a file
    Waker stop_waker;  // awake: stop() was called

    std::atomic<std::size_t> unsent = 0;  // messages that the engine has taken, and that wait

    // Returns the event's number, for dealt_with().
    template <class What>
    std::uint64_t emit(What what) {
        std::uint64_t number = 0;
        {
            std::lock_guard lock(mutex_);
            events_.push_back(Event{std::chrono::system_clock::now(), std::move(what)});
            bytes_ += size_of(events_.back());
            number = taken_ + events_.size();
        }
        changed_.notify_all();
        on_event_();
        return number;
    }
    // How many events the front end has dealt with. If not yet `number`, the waker wakes then.
    std::uint64_t dealt_with(std::uint64_t number) {
        std::lock_guard lock(mutex_);
        awaited_ = dealt_with_ < number ? number : UINT64_MAX;
        return dealt_with_;
    }
    // Until the front end takes some, we read no more: then TCP makes the server wait, and the
    // server bounds what it keeps for us.
    bool has_room_for_events() {
        std::lock_guard lock(mutex_);
        full_ = !has_room();
        return !full_;
    }
    std::optional<Command> take_command() {
        std::unique_lock lock(mutex_);
        if (commands_.empty()) return std::nullopt;
        Command command = std::move(commands_.front());
        commands_.pop_front();
        lock.unlock();
        changed_.notify_all();
        return command;
    }
    // The oldest command of one type, before all others.
    template <class T>
    std::optional<T> take_if_there() {
        std::lock_guard lock(mutex_);
        for (auto it = commands_.begin(); it != commands_.end(); ++it)
            if (auto* found = std::get_if<T>(&*it)) {
                T taken = std::move(*found);
                commands_.erase(it);
                return taken;
            }
        return std::nullopt;
    }
    bool is_stopping() const {
        std::lock_guard lock(mutex_);
        return stopping_;
    }
    // Whom stop() is to abort. Throws NetworkError if it was called already.
    void set_connection(std::shared_ptr<Connection> connection) {
        std::lock_guard lock(mutex_);
        connection_ = std::move(connection);
        if (stopping_ && connection_) throw NetworkError("Stopped.");
    }
    // Blocks until something may have been put here, or until `deadline`.
    void wait(Clock::time_point deadline) {
        std::array<PollEntry, 1> entry{{{waker.handle(), POLLIN, 0}}};
        poll_until(entry, deadline);
        waker.drain();
    }
    void end() {  // there will be no more events
        {
            std::lock_guard lock(mutex_);
            ended_ = true;
        }
        changed_.notify_all();
    }

  private:
    static constexpr std::size_t max_commands = 1024;
    static constexpr std::size_t max_events = 20'000;
    static constexpr std::size_t max_event_bytes = std::size_t{4} << 20;  // of texts in them

    bool has_room() const { return events_.size() < max_events && bytes_ < max_event_bytes; }
    static std::size_t size_of(const Event& event) {
        if (const auto* message = std::get_if<RoomMessage>(&event.what))
            return message->text.size();
        if (const auto* message = std::get_if<PrivateMessage>(&event.what))
            return message->text.size();
        return 0;
    }

    const std::function<void()> on_event_;
    mutable std::mutex mutex_;         // guards the rest
    std::condition_variable changed_;  // for front ends: room for commands, events, the end
    std::deque<Command> commands_;
    std::deque<Event> events_;
    std::size_t bytes_ = 0;    // of the texts in events_
    std::uint64_t taken_ = 0;  // events that the front end has taken so far, and dealt with:
    std::uint64_t dealt_with_ = 0, awaited_ = UINT64_MAX;  // awaited_: then wake the engine
    bool full_ = false;                                    // the engine waits for room in events_
    std::shared_ptr<Connection> connection_;
    bool stopping_ = false, ended_ = false;
};

// The bulk lane of one connection to one login. The threads of several transfers share it.
class ConnectionBulkLane final : public BulkLane {
  public:
    ConnectionBulkLane(std::shared_ptr<PairSender> pair, std::shared_ptr<Connection> connection,
                       LoginId to)
        : pair_(std::move(pair)), connection_(std::move(connection)), to_(to) {}

    // A Send whose payload is a sealed one: everything before the body, with room for what is not
    // known yet, the lengths and seq.
    Bytes begin(std::uint32_t tag, Kind kind) override {
        Bytes frame;
        frame.reserve(frame_header_bytes + max_record_frame);
        frame.resize(frame_header_bytes);
        append_fields(frame, Send::type, std::uint32_t{0}, to_, Lane::bulk, tag, std::uint32_t{0},
                      PayloadType::sealed, std::uint64_t{0}, kind);
        return frame;
    }
    bool finish(Bytes frame) override {
        constexpr std::size_t body_at = frame_header_bytes + message_header_bytes;
        constexpr std::size_t payload_at = body_at + 4 + 1 + 4 + 4;
        frame.resize(frame.size() + gcm_tag_bytes);
        ByteSpan all(frame);
        auto body_size = frame_header(all.size() - body_at);  // a u32 like that of a frame
        auto payload_size = frame_header(all.size() - payload_at);
        std::copy(body_size.begin(), body_size.end(), all.begin() + (body_at - 4));
        std::copy(payload_size.begin(), payload_size.end(), all.begin() + (payload_at - 4));
        Outbox::Result result;
        {
            std::lock_guard lock(mutex_);  // held while waiting: there is room for all who may
            if (!connection_->outbox.wait_for_bulk_room(comfortable)) return false;
            pair_->seal_in_place(Lane::bulk, all.subspan(payload_at));
            result = connection_->outbox.push_frame(std::move(frame));
        }
        connection_->flush();
        return result == Outbox::Result::due || result == Outbox::Result::queued;
    }

  private:
    static constexpr std::size_t comfortable = 256 * 1024;
    std::mutex mutex_;  // what is sealed first is queued first; guards pair_'s bulk lane
    const std::shared_ptr<PairSender> pair_;
    const std::shared_ptr<Connection> connection_;
    const LoginId to_;
};

// Somebody's login, as we see it.
struct Peer {
    LoginId id{};
    std::string user;
    bool card_requested = false;
    std::optional<const CheckedCard> card;
    Standing standing = Standing::unknown;
    std::shared_ptr<PairSender> sender;    // once we have opened to them
    std::shared_ptr<BulkLane> bulk;        // once a file goes to them
    std::optional<PairReceiver> receiver;  // once they have opened to us
    bool unheard = false;                  // an Open of theirs did not open: nothing more is tried
    // What came while their identity is not trusted, a text or the offer of a file: shown after
    // Trust. The last are not kept.
    struct HeldBack {
        std::variant<Text, OpenedPayload> what;
        bool to_room = false;
    };
    std::vector<HeldBack> held_back;
    std::size_t held_bytes = 0, held_count = 0;
};

// A message of ours that is not done: it waits, or is sent and not yet confirmed. Its id is its
// key in a map, so that they stand in the order in which they were written.
struct Written {
    std::string to, text;  // `to`: empty for everybody
    enum class State { waiting, sent } state = State::waiting;
    bool verified_only = false;                          // as LimitRoom was when it was written
    bool told_waiting = false;                           // the user knows that it waits
    std::uint32_t tag = 0;                               // of what was sent, on this connection
    LoginId sent_to{};                                   // in private, like the rest
    std::optional<Fingerprint> reader{};                 // whose identity it was first sealed for,
    std::uint64_t run = 0;                               // and which run of their program
    Clock::time_point until = Clock::time_point::max();  // its reader is waited for
};

// One connection to the server, from connect() to its loss, and who is there.
struct Link {
    explicit Link(Socket socket)
        : connection(std::make_shared<Connection>(std::move(socket), chat_bound, bulk_bound)) {}

    std::shared_ptr<Connection> connection;  // shared with the threads of transfers
    Digest channel_binding{};
    Fingerprint server_key;
    std::optional<LoginKeys> keys;
    std::uint64_t issued = 0;       // our card
    std::set<Digest> met_cards;     // each card is met once, for as long as our own is used
    std::map<LoginId, Peer> peers;  // in ascending order, as Fanout wants it
    std::map<std::string, LoginId> by_name;
    bool said_to_room = false;  // something of ours was sent to everybody

    // Throws ProtocolError for somebody who cannot be.
    Peer& add(const Joined& joined) {
        if (!is_valid_name(joined.user) || joined.id == LoginId{} || peers.size() >= max_people ||
            peers.contains(joined.id) || by_name.contains(joined.user))
            throw ProtocolError("The server announced somebody who cannot be.");
        by_name[joined.user] = joined.id;
        Peer& peer = peers[joined.id];
        peer.id = joined.id;
        peer.user = joined.user;
        return peer;
    }
    Peer* find(LoginId id) {
        auto found = peers.find(id);
        return found == peers.end() ? nullptr : &found->second;
    }
    Peer* find(const std::string& user) {
        auto found = by_name.find(user);
        return found == by_name.end() ? nullptr : find(found->second);
    }
    void remove(LoginId id) {
        auto found = peers.find(id);
        if (found == peers.end()) return;
        by_name.erase(found->second.user);
        peers.erase(found);
    }

  private:
    static constexpr std::size_t max_people = 100'000;
    // Commands wait for much less (see Client::may_take_command), and so do files: whoever makes
    // more wait, by asking and not reading, is no server that one can talk to.
    static constexpr std::size_t chat_bound = std::size_t{16} << 20;
    static constexpr std::size_t bulk_bound = std::size_t{4} << 20;
};

// From "not connected" to "logged in", as often as needed: connects, checks the server's key,
// proves the password, shows the card. Keeps what lasts from one login to the next: the identity,
// the pins, the salted password. The engine's thread uses it; everything in it blocks.
class Login {
  public:
    Login(const ClientOptions& options, std::string user, std::string server, Mailbox& mail)
        : options_(options),
          user_(std::move(user)),
          server_(std::move(server)),
          mail_(mail),
          registering_(options.register_account) {}

    // A connection on which we are logged in, with the people who are there. Throws Halt for what
    // will not be better the next time, NetworkError or ProtocolError for what may.
    std::unique_ptr<Link> connect() {
        detail::AtExit close([&] { link_.reset(); });  // if it fails
        mail_.emit(Connecting{server_});
        begin();
        if (!shake_hands()) {
            begin();
            if (!shake_hands()) throw NetworkError("The server shows another key each time.");
        }
        if (registering_) register_account();
        Bytes recorded = log_in();
        if (options_.accept_new_server) pin_server();  // nobody has compared the key: chapter 6
        prepare_identity();
        Fingerprint own = identity_->public_key().fingerprint();
        if (!recorded.empty() && recorded != to_bytes(own.digest))
            mail_.emit(IdentityReplaced{own});
        publish_card();
        meet_everybody();
        link_->connection->set_patience(options_.ping_after);
        return std::move(link_);
    }
    bool has_been_online() const { return been_online_; }

    // From the first login on:
    const RsaPrivateKey& identity() const { return *identity_; }
    PinStore& pins() { return *pins_; }
    std::filesystem::path account_directory(const Fingerprint& server_key) const {
        std::string server = to_hex(ByteView(server_key.digest).first(16));
        return options_.home / "servers" / server / user_;
    }

  private:
    void begin() {
        if (link_) link_->connection->abort();
        link_ = std::make_unique<Link>(
            connect_to(options_.host, options_.port, options_.connect_timeout, mail_.stop_waker));
        link_->connection->on_full = [this] { mail_.waker.wake(); };
        link_->connection->watch(options_.trace, "server to client", "client to server");
        mail_.set_connection(link_->connection);
        deadline_ = Clock::now() + options_.answer_timeout;
    }

    // The handshake of chapter 5. False if the user had to be asked about the server's key, and has
    // accepted it: a person needs more time for a fingerprint than a server has for a handshake, so
    // that connection is over.
    bool shake_hands() {
        Connection& connection = *link_->connection;
        ClientHandshake handshake;
        connection.send_frame(handshake.hello(), options_.answer_timeout);
        link_->server_key =
            handshake.receive_hello(connection.receive_frame(deadline_)).fingerprint();
        if (!check_server_key(link_->server_key)) return false;
        HopKeys keys;
        connection.send_frame(handshake.key_message(keys, options_.trace), options_.answer_timeout);
        connection.secure(std::move(keys.server_to_client), std::move(keys.client_to_server));
        link_->channel_binding = keys.channel_binding;
        try {
            expect<Welcome>();
        } catch (const ProtocolError& e) {
            throw Halt(
                StopReason::server_distrusted,
                concat("The server at ", server_, " showed the key ", link_->server_key.text(),
                       " and did not prove that it holds it. Somebody may be in between. "
                       "Nothing was sent. (",
                       e.what(), ")"));
        }
        if (!options_.accept_new_server) pin_server();  // the user has said that it is the one
        return true;
    }
    void pin_server() {
        KnownServers known(options_.home);
        if (known.find(server_) != link_->server_key) known.pin(server_, link_->server_key);
    }

    // Returns if `seen` is the key that we trust (false if only since the user was asked), and
    // throws Halt if it is not. Nothing but our hello was sent before.
    bool check_server_key(const Fingerprint& seen) {
        KnownServers known(options_.home);
        std::optional<Fingerprint> pinned =
            options_.server_key ? options_.server_key : known.find(server_);
        if (!pinned) pinned = accepted_key_;
        if (!pinned) {
            if (!options_.accept_new_server) ask_about_server(seen);
            if (!options_.accept_new_server) accepted_key_ = seen;
            return options_.accept_new_server;
        }
        if (*pinned != seen)
            throw Halt(
                StopReason::server_key_changed,
                concat("THE KEY OF THE SERVER AT ", server_,
                       " IS NOT THE ONE WE KNOW.\n"
                       "  known: ",
                       pinned->text(),
                       "\n"
                       "  shown: ",
                       seen.text(),
                       "\n"
                       "Either the server has a new key, or somebody is between you and it and "
                       "reads along. Nothing was sent. Ask the server's operator, by another "
                       "way, which fingerprint is right. If it is the new one, give it once "
                       "with --server-key SHA256:... (or remove the line of ",
                       server_, " from ", known.path().string(), ")."));
        return true;
    }

    // Returns if the user accepts; else throws Halt.
    void ask_about_server(const Fingerprint& seen) {
        std::optional<AcceptServerKey> answer;
        if (options_.ask_about_server) {
            link_->connection->abort();
            mail_.emit(ServerKeyUnknown{server_, seen});
            while (!(answer = mail_.take_if_there<AcceptServerKey>())) {
                if (mail_.is_stopping()) throw NetworkError("Stopped.");
                mail_.wait(Clock::time_point::max());
            }
        }
        if (answer && answer->accept) return;
        throw Halt(
            StopReason::server_key_unknown,
            concat("The server at ", server_, " is not known yet. Its key is\n  ", seen.text(),
                   "\nCompare it with the one that the server's operator gives "
                   "(the server prints it when it starts), then give it with "
                   "--server-key SHA256:... or answer yes when asked; --accept-new takes "
                   "whatever comes first."));
    }

    // The next message of the server, unless that is the end of the attempt. Some refusals pass by
    // themselves: worth another try for somebody who was online already.
    Message next() {
        Message message = link_->connection->expect(deadline_);
        if (message.type != Goodbye::type) return message;
        Goodbye goodbye = from_wire<Goodbye>(message.body);
        bool passing = goodbye.reason == GoodbyeReason::already_online ||
                       goodbye.reason == GoodbyeReason::server_full ||
                       goodbye.reason == GoodbyeReason::too_many_tries;
        if (goodbye.reason == GoodbyeReason::none || (passing && been_online_))
            throw NetworkError(goodbye.sentence);
        throw Halt(StopReason::login_refused, goodbye.sentence);
    }
    template <class T>
    T expect() {
        return from_wire_as<T>(next());
    }

    // Returns the fingerprint of the identity that the account had so far, or nothing.
    Bytes log_in() {
        Remembered before = remembered();
        ScramClient scram(user_, link_->channel_binding);
        link_->connection->send(Scram{scram.first(), before.ticket});
        std::string server_first = expect<Scram>().text;
        LoginDone done;
        Remembered now;
        try {
            auto [salt, iterations] = scram.receive_challenge(server_first);
            if (iterations < before.iterations)
                throw ProtocolError(concat(
                    "The server asks for ", iterations,
                    " iterations, and for this account it "
                    "asked for ",
                    before.iterations,
                    " before: the password would be easier to "
                    "guess. Nothing was sent. If its operator says that this is right, remove ",
                    login_file().string(), "."));
            now.iterations = iterations;
            link_->connection->send(Scram{scram.final(salted_password(salt, iterations))});
            done = expect<LoginDone>();
            scram.verify_server(done.server_final);
        } catch (const ProtocolError& e) {
            throw Halt(StopReason::server_distrusted, e.what());
        }
        if (done.ticket.size() <= max_ticket_bytes) now.ticket = done.ticket;
        if (now.iterations != before.iterations || now.ticket != before.ticket) remember(now);
        return done.identity;
    }

    // What a login leaves for the next one, in the file `login`: one line, the iterations and the
    // ticket (base64, or -).
    static constexpr std::size_t max_ticket_bytes = 1024;  // a larger one is not kept
    struct Remembered {
        std::uint32_t iterations = 0;
        Bytes ticket{};
    };
    std::filesystem::path login_file() const {
        return account_directory(link_->server_key) / "login";
    }
    Remembered remembered() const {
        Remembered found;
        try {
            read_lines(login_file(), 4096, "Remove the file.",
                       [&](const std::vector<std::string>& words) {
                           if (words.size() != 2) throw Error("it is damaged.");
                           auto iterations = parse_number<std::uint32_t>(words[0]);
                           if (!iterations) throw Error("its number is damaged.");
                           found.iterations = *iterations;
                           if (words[1] != "-") found.ticket = from_base64(words[1]);
                       });
        } catch (const Error& e) {
            throw Halt(StopReason::local_trouble, e.what());
        }
        return found;
    }
    void remember(const Remembered& login) const {
        make_private_directory(login_file().parent_path());
        std::string ticket = login.ticket.empty() ? "-" : to_base64(login.ticket);
        write_file(login_file(), as_bytes(concat(login.iterations, " ", ticket, "\n")),
                   FileMode::owner_only);
    }

    void register_account() {
        try {
            check_new_password(options_.password);
        } catch (const Error& e) {
            throw Halt(StopReason::login_refused, e.what());
        }
        load_identity();
        Bytes salt = random_bytes(16);
        ScramVerifier verifier =
            make_verifier(salted_password(salt, options_.iterations), salt, options_.iterations);
        RsaPrivateKey& identity = identity_ ? *identity_ : new_identity();
        link_->connection->send(
            RegisterAccount{user_, verifier.text(), identity.public_key().der()});
        expect<Registered>();
        registering_ = false;
    }

    // PBKDF2 is slow on purpose; a reconnect with the same salt need not pay again.
    const Secret<32>& salted_password(const Bytes& salt, std::uint32_t iterations) {
        if (!salted_ || salt != salted_->salt || iterations != salted_->iterations)
            salted_ = Salted{salt, iterations, pbkdf2_sha256(options_.password, salt, iterations)};
        return salted_->password;
    }

    // ---- The identity ---------------------------------------------------------------------------

    std::filesystem::path identity_file() const {
        return account_directory(link_->server_key) / "identity.pem";
    }
    void load_identity() {
        if (identity_) return;
        try {
            identity_ = RsaPrivateKey::load(identity_file(), options_.password);
        } catch (const Error& e) {
            std::string sentence =
                registering_
                    ? concat(
                          "This computer knows an account of this name here already: log in "
                          "with its password, instead of registering, or choose another name. "
                          "If the server does not know it any more, move its file away. (",
                          e.what(), ")")
                    : concat("Your identity key does not open: ", e.what(),
                             " If the account's password was changed, the file still has the old "
                             "one: change it with \"openssl pkcs8 -topk8 -v2 aes256\", or move the "
                             "file away to get a new identity, which others will have to trust.");
            throw Halt(StopReason::local_trouble, sentence);
        }
        identity_saved_ = identity_.has_value();
    }
    RsaPrivateKey& new_identity() {
        mail_.emit(MakingIdentity{});
        return identity_.emplace(RsaPrivateKey::generate(options_.rsa_bits));
    }
    // On the disk before anybody can have seen it.
    void prepare_identity() {
        load_identity();
        if (!identity_) new_identity();
        if (!identity_saved_) {
            make_private_directory(identity_file().parent_path());
            identity_->save(identity_file(), options_.password, options_.iterations);
            identity_saved_ = true;
        }
        if (!pins_) pins_.emplace(account_directory(link_->server_key) / "known_users");
    }

    void publish_card() {
        std::uint64_t issued = pins_->next_issued(user_, identity_->public_key().fingerprint());
        pins_->save();
        link_->keys.emplace(*identity_, user_, issued, first_issued_.value_or(issued),
                            options_.trace);
        if (!first_issued_) first_issued_ = issued;
        link_->issued = issued;
        link_->met_cards.insert(link_->keys->card_hash);
        link_->connection->send(PublishCard{link_->keys->card_bytes});
    }

    void meet_everybody() {
        LoggedIn event{user_, server_, link_->server_key, identity_file(), {}, been_online_};
        Message message = next();
        for (; message.type != Ready::type; message = next()) {
            auto joined = from_wire_as<Joined>(message);
            if (joined.user != user_) event.others.push_back(link_->add(joined).user);
        }
        from_wire<Ready>(message.body);
        been_online_ = true;
        mail_.emit(std::move(event));
    }

    const ClientOptions& options_;
    const std::string user_, server_;
    Mailbox& mail_;

    struct Salted {
        Bytes salt;
        std::uint32_t iterations = 0;
        Secret<32> password;
    };
    bool registering_;
    bool been_online_ = false;
    std::optional<Fingerprint> accepted_key_;    // by the user, and not proved yet
    std::optional<std::uint64_t> first_issued_;  // of this run's first card: the number of the run
    std::optional<Salted> salted_;
    std::optional<RsaPrivateKey> identity_;
    bool identity_saved_ = false;
    std::optional<PinStore> pins_;
    std::unique_ptr<Link> link_;  // while it is being made
    Clock::time_point deadline_;  // for all of that
};

}  // namespace detail

// Throws Error for a text that is too long for one message: to be said before it is queued.
inline void require_sendable(std::string_view text) {
    if (text.size() > max_text_bytes)
        throw Error(concat("A message has at most ", max_text_bytes, " bytes; this one has ",
                           text.size(), ". It was not sent."));
}

class Client final : private FileHost {
  public:
    // Starts the engine, which connects and logs in; everything else is told in events. Throws
    // Error for a user name that cannot be one, and where there is no home directory.
    explicit Client(ClientOptions options)
        : options_(with_home(std::move(options))),
          user_(fold_name(options_.user)),
          server_(concat(options_.host.find(':') == std::string::npos
                             ? options_.host
                             : concat("[", options_.host, "]"),
                         ":", options_.port)),
          mail_(options_.on_event),
          login_(options_, user_, server_, mail_),
          engine_([this] { run(); }) {}

    // Ends at once, without a goodbye: post Leave and wait for Stopped for a polite end.
    ~Client() {
        stop();
        engine_.join();
    }
    Client(const Client&) = delete;
    Client& operator=(const Client&) = delete;

    // Any thread. Does not block, except for a caller that is a thousand commands ahead.
    void post(Command command) { mail_.post(std::move(command), true); }
    // For a front end that must never wait. False, and nothing is done, where post() would block or
    // the engine has ended.
    bool try_post(Command command) { return mail_.post(std::move(command), false); }
    // How many commands wait for the connection. Any thread.
    std::size_t waiting() const { return mail_.waiting(); }

    // The next event. One thread takes events. The first waits as long as it takes, and gives
    // nothing only after Stopped was taken; the second also when `patience` is over; the third does
    // not wait.
    std::optional<Event> next_event() { return mail_.next_event(std::nullopt); }
    std::optional<Event> next_event(Milliseconds patience) { return mail_.next_event(patience); }
    std::optional<Event> poll_event() { return mail_.next_event(Milliseconds(0)); }

    // Ends at once; Stopped follows. Any thread.
    void stop() noexcept { mail_.stop(); }

    const std::string& user() const { return user_; }

  private:
    static ClientOptions with_home(ClientOptions options) {
        if (options.home.empty())
            throw Error("There is no home directory: HOME is not set. Give --home DIR.");
        return options;
    }
    using Peer = detail::Peer;
    using Halt = detail::Halt;
    using Written = detail::Written;
    static constexpr std::size_t comfortable_outbox = std::size_t{1} << 20;
    static constexpr std::size_t max_waiting = 1000;        // messages that wait to be sent
    static constexpr std::size_t max_identities = 100'000;  // of people who have written to us
    static constexpr int turns_in_a_row = 256;  // for messages, before it is the commands' turn

    template <class What>
    std::uint64_t emit(What what) {
        return last_event_ = mail_.emit(std::move(what));
    }

    // ---- The engine's life ----------------------------------------------------------------------

    void run() noexcept {
        Stopped end{StopReason::left, "Goodbye."};
        try {
            live();
        } catch (const Halt& e) {
            end = {e.reason, e.what()};
        } catch (const std::exception& e) {
            end = {StopReason::local_trouble, e.what()};
        }
        try {
            if (link_) link_->connection->abort();
            files_.reset();
            workers_.reset();    // joins their threads, which may still be writing
            give_up_the_rest();  // before end_link() makes them wait for a connection
            end_link();
            quit_sent_ = false;
            do {  // what was written and never left is lost, but not without a word
                jobs_.clear();
                take_commands();
                give_up_the_rest();
            } while (mail_.waiting() > 0);
            emit(end);
        } catch (const std::exception&) {
            // no memory even for the last words
        }
        mail_.end();
    }

    // Connects, again and again; returns when the user has left.
    void live() {
        int tries = 0;
        for (Milliseconds pause = options_.first_pause;;) {
            std::string reason;
            try {
                link_ = login_.connect();
                begin_conversation();
                tries = 0;
                pause = options_.first_pause;
                converse();
                return;
            } catch (const CannotConnect& e) {
                reason = e.what();
                if (!login_.has_been_online())
                    reason += " Is the server running, and are host and port right?";
            } catch (const ProtocolError& e) {
                reason = e.what();
            } catch (const NetworkError& e) {
                reason = e.what();
            }
            if (mail_.is_stopping() || quit_sent_) return;
            if (!login_.has_been_online()) throw Halt(StopReason::cannot_connect, reason);
            end_link();
            if (options_.reconnect_tries > 0 && ++tries > options_.reconnect_tries)
                throw Halt(StopReason::cannot_connect,
                           concat("Gave up after ", options_.reconnect_tries, " tries: ", reason));
            emit(ConnectionLost{reason, pause});
            std::size_t waiting = jobs_.size();
            for (Clock::time_point next = Clock::now() + pause; Clock::now() < next;) {
                take_commands();
                if (jobs_.size() > std::exchange(waiting, jobs_.size()))
                    emit(Notice{"That is done when the connection is back."});
                if (mail_.is_stopping() || is_time_to_leave()) return;
                mail_.wait(std::min(next, leave_at_));
            }
            pause = std::min(2 * pause, options_.longest_pause);
        }
    }

    void begin_conversation() {
        last_tag_ = 0;
        quit_sent_ = false;
        somebody_came_ = true;  // the roster counts, too
        std::erase_if(came_, [&](const auto& entry) {
            return !link_->by_name.contains(entry.first) && !absent_.contains(entry.first);
        });
        for (const auto& [user, id] : link_->by_name) {
            note_newcomer(user);
            tell_person(user);
        }
        online_since_ = Clock::now();
        if (!files_) files_.emplace(static_cast<FileHost&>(*this), options_.files);
    }
    // Forgets the connection, and nothing that was written.
    void end_link() {
        mail_.set_connection(nullptr);
        if (!link_) return;
        link_->connection->abort();
        if (files_) files_->connection_lost();
        // Who has not come back for so long is not waited for any more.
        if (Clock::now() >= online_since_ + options_.return_patience) absent_.clear();
        if (absent_.size() > max_identities) absent_.clear();  // that is no room, but an attack
        for (const auto& [user, id] : link_->by_name) absent_.insert(user);
        receipts_due_.clear();  // what has none will come again
        for (auto& [id, message] : written_)
            if (message.state == Written::State::sent)
                wait_again(id, message, "until the connection is back");
        for (const auto& [id, peer] : link_->peers) tell_held_back_is_gone(peer);
        link_.reset();
    }

    // ---- The conversation -----------------------------------------------------------------------

    // Handles what comes, from both sides, until the user has left. Throws NetworkError when the
    // connection is lost.
    void converse() {
        for (;;) {
            bool more = false;  // is there something to do without waiting?
            if (!handle_messages(more)) return;
            take_commands();
            run_jobs();
            send_written();
            send_receipts();
            leave_if_done();
            while (std::optional<DiskAnswer> answer = workers_->take_answer())
                files_->answered(*answer);
            if (Clock::now() >= files_->next_deadline()) files_->tick(Clock::now());
            if (std::exchange(somebody_came_, false)) files_->peer_is_back();
            link_->connection->flush();
            if (more) link_->connection->flush_full();
            save_pins();
            if (mail_.is_stopping()) return;
            if (!more && !(may_take_command() && mail_.waiting() > mail_.unsent))
                link_->connection->wait(std::min(files_->next_deadline(), next_deadline()),
                                        &mail_.waker, mail_.has_room_for_events());
            mail_.waker.drain();
        }
    }

    // What has come from the server, or the beginning of it; then `more` is set. False when the
    // user has left.
    bool handle_messages(bool& more) {
        for (int turn = 0; mail_.has_room_for_events(); ++turn) {
            more = turn == turns_in_a_row;
            if (more) return true;
            std::optional<Message> message;
            try {
                message = link_->connection->next();
            } catch (const NetworkError&) {
                if (quit_sent_) return false;
                throw;
            }
            if (!message) return true;
            if (!handle(*message)) return false;
        }
        return true;
    }

    // Also while there is no connection: then what is written waits.
    void take_commands() {
        for (int turn = 0; turn < turns_in_a_row && may_take_command(); ++turn) {
            std::optional<Command> command = mail_.take_command();
            if (!command) return;
            if (const auto* leave = std::get_if<Leave>(&*command))
                begin_to_leave(*leave);
            else if (const auto* say = std::get_if<Say>(&*command))
                write("", say->text);
            else if (const auto* tell = std::get_if<Tell>(&*command))
                write(tell->user, tell->text);
            else if (const auto* limit = std::get_if<LimitRoom>(&*command))
                limit_room(*limit);  // at once: it is for what is written behind it
            else
                jobs_.push_back(std::move(*command));
        }
    }
    bool may_take_command() const {
        return mail_.unsent < max_waiting && jobs_.size() < max_waiting && !quit_sent_ &&
               !(link_ && link_->connection->outbox.is_over(comfortable_outbox));
    }
    // When something has to be looked at, though nothing has come.
    Clock::time_point next_deadline() const {
        return std::min(quit_sent_ ? Clock::time_point::max() : leave_at_, written_until_);
    }

    void save_pins() {
        try {
            login_.pins().save();
        } catch (const Error& e) {
            if (!std::exchange(save_failed_, true)) emit(Problem{e.what()});
            return;
        }
        save_failed_ = false;
    }

    // False after the server's answer to our goodbye.
    bool handle(const Message& message) {
        switch (message.type) {
            case Joined::type: {
                auto joined = from_wire<Joined>(message.body);
                if (joined.user == user_) break;  // nobody: that is us
                // Nobody is here twice: otherwise one would read along whom nobody sees any more.
                if (const Peer* before = link_->find(joined.user)) remove_peer(before->id);
                emit(PersonJoined{link_->add(joined).user});
                note_newcomer(joined.user);
                tell_person(joined.user);
                somebody_came_ = true;  // perhaps a file waits for them
                break;
            }
            case Left::type:
                remove_peer(from_wire<Left>(message.body).id);
                break;
            case CardOf::type:
                receive_card(from_wire<CardOf>(message.body));
                break;
            case Delivered::type:
                receive(from_wire<Delivered>(message.body));
                break;
            case RoomDelivered::type:
                receive_room(from_wire<RoomDelivered>(message.body));
                break;
            case Undelivered::type:
                came_back(from_wire<Undelivered>(message.body));
                break;
            case Taken::type:
                taken(from_wire<Taken>(message.body).tag);
                break;
            case Ping::type:  // of a server that asks and does not read: not for ever
                if (!link_->connection->outbox.is_over(comfortable_outbox))
                    push_control(Pong{from_wire<Ping>(message.body).number});
                break;
            case Pong::type:
                from_wire<Pong>(message.body);
                break;
            case Goodbye::type: {
                Goodbye goodbye = from_wire<Goodbye>(message.body);
                if (quit_sent_ && goodbye.reason == GoodbyeReason::none) return false;
                throw NetworkError(goodbye.sentence);
            }
            default:
                throw ProtocolError(concat("The server sent a message of the unknown type ",
                                           static_cast<int>(message.type), "."));
        }
        return true;
    }

    // ---- People ---------------------------------------------------------------------------------

    // Their login ends, and with it what was held back.
    void tell_held_back_is_gone(const Peer& peer) {
        if (peer.held_count == 0) return;
        emit(Complaint{peer.user, concat("What was held back of ", peer.user, " is gone (",
                                         peer.held_count, " in all).")});
    }
    void remove_peer(LoginId id) {
        Peer* peer = link_->find(id);
        if (peer == nullptr) return;
        std::string user = peer->user;
        tell_held_back_is_gone(*peer);
        link_->remove(id);
        came_.erase(user);
        files_->peer_left(id, user);
        for (auto& [number, message] : written_) {
            if (message.to != user) continue;
            if (message.state == Written::State::sent && message.sent_to == id)
                wait_again(number, message, concat("until ", user, " is back"));
            // Also one that was only waiting for the card: it was written to somebody who was here.
            if (message.state == Written::State::waiting)
                message.until = Clock::now() + options_.return_patience;
        }
        emit(PersonLeft{user});
    }

    // True when it is known whether the peer can be trusted; else asks for the card.
    bool is_settled(Peer& peer) {
        if (peer.standing != Standing::unknown) return true;
        if (!std::exchange(peer.card_requested, true)) push_control(GetCard{peer.id});
        return false;
    }

    void receive_card(const CardOf& message) {
        if (Peer* peer = link_->find(message.id)) accept_card(*peer, message.card);
    }

    // The first card of a login settles who it is; a different one later is ignored.
    void accept_card(Peer& peer, ByteView bytes) {
        if (peer.standing != Standing::unknown) return;
        somebody_came_ = true;
        judge_card(peer, bytes);
        tell_person(peer.user);
    }
    void judge_card(Peer& peer, ByteView bytes) {
        try {
            peer.card.emplace(bytes, peer.user);
            if (!link_->met_cards.insert(peer.card->hash).second)
                throw ProtocolError(concat("The server showed a key card of ", peer.user,
                                           " a second time, as another login. It is not used."));
        } catch (const ProtocolError& e) {
            peer.standing = Standing::refused;
            complain(peer.user, e.what());
            return;
        }
        note_run(peer.user, peer.card->run);
        switch (login_.pins().judge(*peer.card)) {
            case PinStore::Verdict::first_seen:
                emit(IdentityPinned{peer.user, peer.card->fingerprint});
                peer.standing = Standing::trusted;
                break;
            case PinStore::Verdict::known:
                peer.standing = Standing::trusted;
                break;
            case PinStore::Verdict::changed:
                peer.standing = Standing::changed;
                emit(IdentityChanged{peer.user, login_.pins().find(peer.user)->fingerprint,
                                     peer.card->fingerprint});
                break;
            case PinStore::Verdict::replayed:
                peer.standing = Standing::changed;
                emit(Complaint{peer.user,
                               concat("The server showed an old key card of ", peer.user,
                                      ", from an earlier login. It is not used, unless you trust ",
                                      peer.user, ": perhaps a clock there was wrong.")});
                break;
        }
    }

    // ---- Receiving ------------------------------------------------------------------------------

    void receive(const Delivered& message) {
        Peer* peer = link_->find(message.from);
        if (peer == nullptr || peer->unheard || message.payload.empty()) return;
        auto type = static_cast<PayloadType>(message.payload[0]);
        ByteView rest = message.payload.subspan(1);
        if (type == PayloadType::open && message.lane == Lane::interactive)
            receive_open(*peer, rest);
        else if (type == PayloadType::sealed && peer->receiver)
            receive_sealed(*peer, message.lane, peer->receiver->open(message.lane, rest));
        else
            tell_unopenable(*peer);
    }

    // Of what is wrong with what somebody sends, enough is told and not more: see the essay.
    void complain(const std::string& user, const std::string& sentence) override {
        if (user.empty()) {
            emit(Problem{sentence});
            return;
        }
        constexpr std::size_t most = 10'000;  // a server can invent names without end
        if (ignored_.contains(user) || (oddities_.size() >= most && !oddities_.contains(user)))
            return;
        std::uint64_t times = ++oddities_[user].complaints;
        if (!is_worth_telling(times)) return;
        emit(Complaint{user, times < 10 ? sentence
                                        : concat("So far ", times, " things that ", user,
                                                 " sent could not be used.")});
    }
    static bool is_worth_telling(std::uint64_t times) {
        if (times <= 5) return true;
        while (times % 10 == 0) times /= 10;
        return times == 1;
    }

    // It was sealed with keys that never arrived. (Of a peer who was refused we have said enough.)
    void tell_unopenable(const Peer& peer) {
        if (peer.standing != Standing::refused)
            complain(peer.user,
                     concat("Something arrived from ", peer.user, " that cannot be opened."));
    }

    void receive_open(Peer& peer, ByteView body) {
        try {
            OpenPayload open = decode<OpenPayload>(body, "somebody's keys");
            accept_card(peer, open.card);
            if (peer.receiver || peer.standing == Standing::refused ||
                sha256(open.card) != peer.card->hash)
                throw ProtocolError(
                    concat("Keys came from ", peer.user,
                           " that are not the ones of this login. They are not used."));
            peer.unheard = true;  // if it does not open: each try costs an RSA operation
            peer.receiver.emplace(*link_->keys, *peer.card, open.encapsulated);
            peer.unheard = false;
        } catch (const ProtocolError& e) {
            complain(peer.user, e.what());
        }
    }

    // True if what came is good.
    bool check_opened(const Peer& peer, const OpenedPayload& opened) {
        if (opened.state == OpenedPayload::State::damaged)
            complain(peer.user, concat("A message from ", peer.user,
                                       " was changed on its way, and is not shown."));
        if (opened.state == OpenedPayload::State::repeated)
            complain(peer.user,
                     concat("A message from ", peer.user, " came twice; once is shown."));
        if (opened.state != OpenedPayload::State::good) return false;
        if (opened.lost > 0 && !ignored_.contains(peer.user)) {
            Oddities& oddities = oddities_[peer.user];
            oddities.lost += opened.lost;
            if (is_worth_telling(++oddities.gaps))
                emit(MessagesLost{peer.user, std::exchange(oddities.lost, 0)});
        }
        return true;
    }

    void receive_sealed(Peer& peer, Lane lane, OpenedPayload opened) {
        if (!check_opened(peer, opened)) return;
        if ((opened.kind == Kind::file_chunk) != (lane == Lane::bulk)) return;
        switch (opened.kind) {
            case Kind::text:
                if (auto text = Text::decoded(opened.body)) receive_text(peer, false, *text);
                return;
            case Kind::receipt:
                if (peer.standing == Standing::trusted) receive_receipt(peer, opened.body);
                return;
            case Kind::file_offer:
            case Kind::file_accept:
            case Kind::file_credit:
            case Kind::file_chunk:
            case Kind::file_over:
                return receive_file(peer, std::move(opened));
            case Kind::room_key:  // belongs into a RoomDelivered
                return;
        }
        // any other: from a newer program
    }
    // Of somebody who is not trusted, offers wait, and so does their withdrawal.
    void receive_file(Peer& peer, OpenedPayload opened) {
        bool offer = opened.kind == Kind::file_offer;
        if (offer && ignored_.contains(peer.user)) return;
        if (peer.standing == Standing::trusted)
            files_->receive(as_file_peer(peer), std::move(opened));
        else if (offer || opened.kind == Kind::file_over)
            hold_back(peer, {std::move(opened)});
    }

    void receive_room(const RoomDelivered& message) {
        Peer* peer = link_->find(message.from);
        if (peer == nullptr || peer->unheard) return;
        if (!peer->receiver) return tell_unopenable(*peer);
        Secret<wrapped_key_bytes> wrapped{ByteView(message.wrapped_key)};
        OpenedPayload opened = peer->receiver->unwrap_key(wrapped, sha256(message.text));
        if (!check_opened(*peer, opened) || opened.kind != Kind::room_key ||
            opened.body.size() != 32)
            return;
        if (auto plain = open_room_text(message.text, Secret<32>(opened.body), options_.trace))
            if (auto text = Text::decoded(as_bytes(*plain))) receive_text(*peer, true, *text);
    }

    // Shows it, once, and confirms it if it was for us alone.
    // What is ignored is not confirmed, so it may come again: it stays hidden.
    void receive_text(Peer& peer, bool to_room, const Text& text) {
        // The name belongs to it: one person may have two accounts with one identity.
        const std::pair sender(peer.user, peer.card->fingerprint.digest);
        if (shown_.size() >= max_identities && !shown_.contains(sender)) return;
        auto& [shown, hidden] = shown_[sender];
        ShownIds::Verdict verdict = shown.judge(text.id);
        bool fresh = verdict == ShownIds::Verdict::fresh, ignored = ignored_.contains(peer.user);
        if (fresh && ignored) hidden.add(text.id);
        if (ignored || (fresh && hidden.judge(text.id) != ShownIds::Verdict::fresh)) return;
        if (peer.standing != Standing::trusted) return hold_back(peer, {text, to_room});
        std::uint64_t event = last_event_;  // if it came before, its event is among those until now
        if (verdict == ShownIds::Verdict::too_old) return;
        if (fresh) {
            shown.add(text.id);
            event = to_room ? emit(RoomMessage{peer.user, text.words, false, text.id})
                            : emit(PrivateMessage{peer.user, text.words, false, text.id});
        }
        if (!to_room) receipts_due_.push_back({event, peer.id, text.id});
    }
    void hold_back(Peer& peer, Peer::HeldBack held) {
        if (peer.standing != Standing::changed) return;
        const auto* sealed = std::get_if<OpenedPayload>(&held.what);
        bool counts = sealed == nullptr || sealed->kind == Kind::file_offer;
        if (counts && is_worth_telling(++peer.held_count))
            emit(Complaint{
                peer.user,
                concat("Something came from ", peer.user,
                       ", and is held back until you trust the new identity",
                       peer.held_count == 1 ? "." : concat(" (", peer.held_count, " so far)."))});
        peer.held_bytes +=
            sealed != nullptr ? sealed->body.size() : std::get<Text>(held.what).words.size();
        if (peer.held_back.size() < 100 && peer.held_bytes < 4 * max_text_bytes)
            peer.held_back.push_back(std::move(held));
    }

    // ---- Delivery -------------------------------------------------------------------------------

    struct ReceiptDue {
        std::uint64_t event = 0;  // the message was shown when the front end has dealt with this
        LoginId from{};
        std::uint64_t id = 0;
    };
    void send_receipts() {
        if (receipts_due_.empty()) return;
        std::uint64_t shown = mail_.dealt_with(receipts_due_.back().event);
        std::map<LoginId, Bytes> receipts;
        auto send = [&](LoginId to, Bytes& ids) {
            Peer* peer = link_->find(to);
            if (peer != nullptr && open_to(*peer))
                push(Send{to, Lane::interactive, ++last_tag_,
                          peer->sender->seal(Lane::interactive, Kind::receipt, ids)});
            ids.clear();
        };
        for (; !receipts_due_.empty() && receipts_due_.front().event <= shown;
             receipts_due_.pop_front()) {
            Bytes& ids = receipts[receipts_due_.front().from];
            append_fields(ids, receipts_due_.front().id);
            if (ids.size() >= max_text_bytes) send(receipts_due_.front().from, ids);
        }
        for (auto& [from, ids] : receipts)
            if (!ids.empty()) send(from, ids);
    }
    void receive_receipt(const Peer& peer, ByteView body) {
        if (body.size() % sizeof(std::uint64_t) != 0) return;
        for (Reader ids(body, "a receipt"); !ids.empty();) {
            std::uint64_t id = 0;
            ids(id);
            auto found = written_.find(id);
            if (found != written_.end() && found->second.to == peer.user &&
                found->second.reader == peer.card->fingerprint)
                finish(found, Delivery::delivered, "");
        }
    }
    // Room messages up to this tag are in everybody's queue.
    void taken(std::uint32_t tag) {
        for (auto it = written_.begin(); it != written_.end();) {
            auto here = it++;
            const Written& message = here->second;
            if (message.to.empty() && message.state == Written::State::sent && message.tag <= tag)
                finish(here, Delivery::sent, "");
        }
    }
    // What was sent to everybody is not for who comes later, also if it has to be sent again: they
    // would read it behind what is written to them in the meantime. `absent_` are those who were
    // here when we lost the connection: for them it was sent, if they are back before it is sent
    // again, and it is the same program of theirs (another one does not know what the one before
    // has shown).
    void note_newcomer(const std::string& user) {
        if (absent_.erase(user) == 0 || link_->said_to_room) came_[user].after = last_to_room_;
    }
    void note_run(const std::string& user, std::uint64_t run) {
        Coming& coming = came_[user];
        std::uint64_t before = std::exchange(coming.run, run);
        if (before == 0 || before == run) return;
        coming.after = last_to_room_;
        for (const auto& [id, message] : written_)
            if (message.to.empty() && id <= coming.after) {
                emit(Notice{concat("What you said to everybody just before may not have reached ",
                                   user, ", whose program was started anew.")});
                return;
            }
    }
    bool came_too_late(const std::string& user, std::uint64_t id) const {
        auto found = came_.find(user);
        return found != came_.end() && id <= found->second.after;
    }

    // The user has written something: from here on it is shown, sent, and not lost in silence.
    void write(const std::string& to, const std::string& text) {
        if (to == user_) {
            emit(Problem{"That is you."});
            return;
        }
        try {
            require_sendable(text);
        } catch (const Error& e) {
            emit(Problem{e.what()});
            return;
        }
        if (link_) last_id_ = std::max(last_id_, link_->issued);
        written_[++last_id_] = {.to = to, .text = text, .verified_only = verified_room_};
        ++mail_.unsent;
        if (to.empty())
            emit(RoomMessage{user_, text, true, last_id_});
        else
            emit(PrivateMessage{to, text, true, last_id_});
        if (!link_) tell_waiting(last_id_, written_[last_id_], "until the connection is back");
    }
    void tell_waiting(std::uint64_t id, Written& message, const std::string& reason) {
        if (!std::exchange(message.told_waiting, true))
            emit(DeliveryChanged{id, message.to, message.text, Delivery::waiting, reason});
    }
    void wait_again(std::uint64_t id, Written& message, const std::string& reason) {
        message.state = Written::State::waiting;
        message.told_waiting = false;
        message.until = Clock::time_point::max();
        ++mail_.unsent;
        tell_waiting(id, message, reason);
    }
    void note_sent(Written& message, std::uint32_t tag) {
        message.state = Written::State::sent;
        message.tag = tag;
        message.told_waiting = false;
        --mail_.unsent;
    }
    using WrittenAt = std::map<std::uint64_t, Written>::iterator;
    void finish(WrittenAt message, Delivery state, const std::string& reason) {
        if (message->second.state == Written::State::waiting) --mail_.unsent;
        emit(DeliveryChanged{message->first, message->second.to, message->second.text, state,
                             reason});
        written_.erase(message);
        if (state != Delivery::failed) note_progress();
    }
    void give_up_the_rest() {
        for (auto it = written_.begin(); it != written_.end();) {
            auto here = it++;
            finish(here, Delivery::failed,
                   here->second.state == Written::State::sent
                       ? (here->second.to.empty() ? "the server did not confirm it"
                                                  : "did not confirm it before you left")
                       : (here->second.to.empty() ? "you left before"
                                                  : "was not reached before you left"));
        }
    }

    // Whatever can go, in the order in which it was written.
    void send_written() {
        written_until_ = Clock::time_point::max();
        if (mail_.unsent == 0) return;
        std::set<std::string> held_up;  // whose earlier messages wait
        for (auto it = written_.begin(); it != written_.end();) {
            auto here = it++;
            Written& message = here->second;
            if (message.state != Written::State::waiting || held_up.contains(message.to)) continue;
            if (link_->connection->outbox.is_over(comfortable_outbox)) return;
            if (message.to.empty() ? send_to_room(here) : send_to_one(here)) continue;
            written_until_ = std::min(written_until_, message.until);  // of those that it is up to
            if (message.to.empty()) return;  // everybody behind would read in another order
            held_up.insert(message.to);
        }
    }

    // False if it has to wait: for cards, or for those who were here before.
    bool send_to_room(WrittenAt at) {
        auto& [id, message] = *at;
        Clock::time_point regathered = online_since_ + options_.regather;
        if (!absent_.empty() && Clock::now() < regathered) {
            message.until = regathered;
            tell_waiting(id, message, "until the others are back");
            return false;
        }
        message.until = Clock::time_point::max();
        bool settled = true;  // asks for all missing cards at once
        for (auto& [login, peer] : link_->peers) settled = is_settled(peer) && settled;
        if (!settled) return false;
        SealedRoomText room =
            seal_room_text(as_text(Text{id, message.text}.encoded()), options_.trace);
        Digest hash = sha256(room.sealed);
        const std::size_t room_for_keys = max_message_body - 12 - room.sealed.size();
        Bytes wrapped_keys;
        std::uint32_t tag = 0;
        auto flush = [&] {
            if (wrapped_keys.empty()) return;
            push(Fanout{tag = ++last_tag_, room.sealed, wrapped_keys});
            wrapped_keys.clear();
        };
        bool late = false;  // somebody is here for whom it is not
        for (auto& [login, peer] : link_->peers) {
            const bool too_late = came_too_late(peer.user, id);
            late = late || too_late;
            if (message.verified_only && !is_verified(peer)) continue;
            if (too_late || !open_to(peer)) continue;
            if (wrapped_keys.size() + Fanout::entry_bytes > room_for_keys) flush();
            append_fields(wrapped_keys, login, peer.sender->wrap_key(room.key, hash));
        }
        flush();
        if (tag != 0) {
            note_sent(message, tag);
            last_to_room_ = std::max(last_to_room_, id);
            link_->said_to_room = true;
            return true;
        }
        if (late) {
            finish(at, Delivery::failed, "nobody is here who was there when it was written");
            return true;
        }
        emit(Notice{link_->peers.empty() ? "Nobody else is here to read it."
                    : message.verified_only
                        ? "Nobody whom you have verified is here to read it."
                        : "Nobody whose identity you trust is here to read it."});
        finish(at, Delivery::sent, "");
        return true;
    }

    bool is_verified(const Peer& peer) {
        const Pin* pin = login_.pins().find(peer.user);
        return pin != nullptr && pin->verified;
    }

    // False if it has to wait: for the card, or for a reader who has left and may come back.
    bool send_to_one(WrittenAt at) {
        auto& [id, message] = *at;
        Peer* peer = link_->find(message.to);
        if (peer == nullptr) {
            Clock::time_point now = Clock::now();
            if (message.until == Clock::time_point::max())  // who has left since: see remove_peer()
                message.until =
                    absent_.contains(message.to) ? online_since_ + options_.return_patience : now;
            if (now < message.until) {
                tell_waiting(id, message, concat("until ", message.to, " is back"));
                return false;
            }
            finish(at, Delivery::failed,
                   message.reader ? "left before it was delivered" : "is not online");
            return true;
        }
        message.until = Clock::time_point::max();
        if (!is_settled(*peer)) return false;
        bool other = message.reader && *message.reader != peer->card->fingerprint;
        if (other || !open_to(*peer)) {
            finish(at, Delivery::failed, why_not(*peer));
            return true;
        }
        if (message.reader && message.run != peer->card->run) {
            finish(at, Delivery::failed, "left before it was delivered");
            return true;
        }
        login_.pins().keep(*peer->card);
        message.reader = peer->card->fingerprint;
        message.run = peer->card->run;
        message.sent_to = peer->id;
        std::uint32_t tag = ++last_tag_;
        push(Send{
            peer->id, Lane::interactive, tag,
            peer->sender->seal(Lane::interactive, Kind::text, Text{id, message.text}.encoded())});
        note_sent(message, tag);
        emit(DeliveryChanged{id, message.to, message.text, Delivery::sent});
        return true;
    }

    // There was no room in somebody's queue.
    void came_back(const Undelivered& message) {
        if (FileTransfers::is_file_tag(message.tag)) return files_->came_back(message.tag);
        Peer* peer = link_->find(message.to);
        if (peer == nullptr) return;
        if (message.tag == 0) {  // our keys: what was sealed with them since does not open either
            if (peer->sender == nullptr) return;  // once for each time that we opened to them
            peer->sender.reset();
            peer->bulk.reset();
        }
        bool told = false;
        for (auto it = written_.begin(); it != written_.end();) {
            auto here = it++;
            const Written& written = here->second;
            bool lost = message.tag != 0 ? written.tag == message.tag
                                         : written.to.empty() || written.sent_to == message.to;
            if (written.state != Written::State::sent || !lost) continue;
            if (!written.to.empty())
                finish(here, Delivery::failed, "cannot keep up at the moment");
            else if (!std::exchange(told, true))
                complain(peer->user, concat("A message to everybody did not reach ", peer->user,
                                            ", who cannot keep up."));
        }
    }

    // ---- Leaving --------------------------------------------------------------------------------

    void begin_to_leave(const Leave& leave) {
        leaving_ = leave;
        note_progress();
    }
    void note_progress() {
        if (leaving_) leave_at_ = Clock::now() + leaving_->patience;
    }
    bool is_time_to_leave() const {
        if (!leaving_) return false;
        return Clock::now() >= leave_at_ ||
               (written_.empty() && jobs_.empty() &&
                !(leaving_->after_files && files_ && files_->is_busy()));
    }
    void leave_if_done() {
        if (quit_sent_ || !is_time_to_leave()) return;
        if (leaving_->after_files) files_->tell_unfinished();
        push_control(Quit{});
        quit_sent_ = true;
    }

    // ---- Jobs: commands being done --------------------------------------------------------------

    void run_jobs() {
        while (!jobs_.empty()) {
            if (!attempt(jobs_.front())) return;
            jobs_.pop_front();
        }
    }

    // False if it has to wait for a card.
    bool attempt(const Command& job) {
        try {
            return std::visit([&](const auto& command) { return perform(command); }, job);
        } catch (const ProtocolError&) {
            throw;
        } catch (const NetworkError&) {
            throw;
        } catch (const Error& e) {
            emit(Problem{e.what()});
            return true;
        }
    }
    // What take_commands() or Login has dealt with.
    bool perform(const Say&) { return true; }
    bool perform(const Tell&) { return true; }
    bool perform(const LimitRoom&) { return true; }
    bool perform(const Leave&) { return true; }
    bool perform(const AcceptServerKey&) { return true; }

    // Makes sure that we can seal for a peer. False if we must not.
    bool open_to(Peer& peer) {
        if (peer.standing != Standing::trusted) return false;
        if (peer.sender) return true;
        try {
            Bytes open;
            peer.sender = std::make_shared<PairSender>(*link_->keys, *peer.card, open);
            push(Send{peer.id, Lane::interactive, 0, open});  // 0: not a message
            return true;
        } catch (const ProtocolError& e) {
            peer.standing = Standing::refused;
            complain(peer.user, e.what());
            tell_person(peer.user);
            return false;
        }
    }

    // Why nothing is sent to a peer, who ..., and what to do.
    static std::string why_not(const Peer& peer) {
        if (peer.standing == Standing::refused) return "has shown no valid key card";
        return concat("has another identity than before: compare safety numbers (/verify ",
                      peer.user, "), then /trust ", peer.user);
    }

    // Queues a message; it is sent before the engine waits. Throws NetworkError where more waits
    // already than any server that reads lets wait.
    template <class T>
    void push(const T& message) {
        queued(link_->connection->outbox.push(Lane::interactive, message));
    }
    template <class T>
    void push_control(const T& message) {
        queued(link_->connection->outbox.push_control(message));
    }
    static void queued(Outbox::Result result) {
        if (result == Outbox::Result::refused)
            throw NetworkError("The server takes nothing any more.");
    }

    bool perform(const ListPeople&) {
        People event{{{.user = user_, .standing = Standing::trusted, .self = true}}};
        for (const auto& [user, id] : link_->by_name) event.people.push_back(what_we_know_of(user));
        emit(std::move(event));
        return true;
    }
    Person what_we_know_of(const std::string& user) {
        const Peer* peer = link_->find(user);
        const Pin* pin = login_.pins().find(user);
        Standing standing = peer != nullptr ? peer->standing : Standing::unknown;
        bool verified = pin != nullptr && pin->verified && may_pass(standing);
        return {user, standing, false, verified, ignored_.contains(user)};
    }
    void tell_person(const std::string& user) { emit(PersonChanged{what_we_know_of(user)}); }

    bool perform(const Verify& verify) {
        if (verify.user == user_) throw Error("That is you.");
        Peer* peer = link_->find(verify.user);
        if (peer != nullptr && !is_settled(*peer)) return false;
        const Pin* pin = login_.pins().find(verify.user);
        bool changed = peer != nullptr && peer->standing == Standing::changed;
        if (pin == nullptr)
            throw Error(concat("You have not met ", verify.user, " yet, who ",
                               peer != nullptr ? why_not(*peer) : "is not online", "."));
        // Of somebody whose identity has changed, the number to compare is the new one's.
        Fingerprint mine = login_.identity().public_key().fingerprint();
        Fingerprint theirs = changed ? peer->card->fingerprint : pin->fingerprint;
        if (verify.agree == false) login_.pins().set_verified(verify.user, false);
        if (verify.agree == true) {
            auto told = told_numbers_.find(verify.user);
            bool other = verify.compared               ? *verify.compared != theirs
                         : told != told_numbers_.end() ? told->second != theirs
                                                       : changed;
            if (other)
                throw Error(concat("What you compared is not the identity that is known of ",
                                   verify.user, ": /verify ", verify.user, " again."));
            if (changed) accept_identity(*peer);  // compared and trusted in one act
            login_.pins().set_verified(verify.user, true);
        }
        told_numbers_.insert_or_assign(verify.user, theirs);
        emit(SafetyNumber{verify.user, safety_number(user_, mine, verify.user, theirs), mine,
                          theirs, what_we_know_of(verify.user).verified});
        if (verify.agree) tell_person(verify.user);
        return true;
    }

    bool perform(const Trust& trust) {
        Peer* peer = link_->find(trust.user);
        if (peer == nullptr) throw Error(concat(trust.user, " is not online."));
        if (!is_settled(*peer)) return false;
        if (peer->standing == Standing::refused)
            throw Error(concat(trust.user, " ", why_not(*peer), "."));
        if (peer->standing != Standing::changed)
            throw Error(concat("The identity of ", trust.user, " has not changed."));
        if (trust.compared && *trust.compared != peer->card->fingerprint)
            throw Error(
                concat("The identity of ", trust.user, " has changed once more: compare again."));
        accept_identity(*peer);
        return true;
    }
    // From now on it is trusted; what was held back is shown.
    void accept_identity(Peer& peer) {
        login_.pins().trust(*peer.card);
        peer.standing = Standing::trusted;
        somebody_came_ = true;
        emit(Notice{concat("From now on ", peer.user, " is ", peer.card->fingerprint.text(), ".")});
        tell_person(peer.user);
        std::size_t count = std::exchange(peer.held_count, 0);
        std::vector<Peer::HeldBack> held_back = std::exchange(peer.held_back, {});
        peer.held_bytes = 0;
        if (count == 0) return;
        emit(Notice{concat("What ", peer.user, " has sent meanwhile",
                           count == held_back.size() ? ":"
                                                     : concat(" (", count, " in all; the first ",
                                                              held_back.size(), " were kept):"))});
        for (Peer::HeldBack& held : held_back)
            if (const auto* text = std::get_if<Text>(&held.what))
                receive_text(peer, held.to_room, *text);
            else
                receive_file(peer, std::get<OpenedPayload>(std::move(held.what)));
    }

    bool perform(const Ignore& ignore) {
        if (ignore.user == user_) throw Error("That is you.");
        if (link_->find(ignore.user) == nullptr && login_.pins().find(ignore.user) == nullptr &&
            ignored_.count(ignore.user) == 0)
            throw Error(concat("There is nobody called ", ignore.user, " here."));
        bool now = ignored_.insert(ignore.user).second;
        if (!now) ignored_.erase(ignore.user);
        tell_person(ignore.user);
        emit(Notice{concat(
            "What ", ignore.user, " writes and offers is ",
            now ? "hidden, and not kept, until you leave or do this once more." : "shown again.")});
        return true;
    }

    void limit_room(const LimitRoom& limit) {
        verified_room_ = limit.verified_only;
        emit(Notice{verified_room_ ? "From now on only people whom you have verified can read what "
                                     "you say to everybody."
                                   : "From now on everybody here can read what you say to all."});
    }
    bool perform(const SendFile& file) {
        if (file.user == user_) throw Error("That is you.");
        Peer* peer = link_->find(file.user);
        if (peer == nullptr)
            throw Error(concat(file.user, " is not online. Files go from hand to hand: both sides ",
                               "have to be there."));
        if (!is_settled(*peer)) return false;
        if (!open_to(*peer))
            throw Error(concat("Nothing is sent to ", file.user, ", who ", why_not(*peer), "."));
        std::vector<std::shared_ptr<const SourceFile>> sources;
        try {
            for (const std::filesystem::path& path : file.paths)
                sources.push_back(std::make_shared<SourceFile>(path));
        } catch (const Error& e) {
            if (file.paths.size() == 1) throw;
            throw Error(concat(e.what(), " None of the ", file.paths.size(),
                               " is offered. Quote a path that has blanks."));
        }
        login_.pins().keep(*peer->card);
        send_written();  // who writes "here it is" before has it read before
        for (const auto& [id, message] : written_)
            if (message.state == Written::State::waiting &&
                (message.to.empty() || message.to == file.user))
                return false;
        for (auto& source : sources) files_->offer(as_file_peer(*peer), std::move(source));
        return true;
    }
    bool perform(const AcceptFile& file) {
        files_->accept(file.number, file.name);
        return true;
    }
    bool perform(const DeclineFile& file) {
        files_->decline(file.number);
        return true;
    }
    bool perform(const CancelFile& file) {
        files_->cancel(file.number);
        return true;
    }
    bool perform(const ListFiles&) {
        emit(files_->list());
        return true;
    }

    // ---- What the transfers of chapter 9 need ---------------------------------------------------

    void tell(FileEvent event) override {
        note_progress();
        emit(std::move(event));
    }

    static FilePeer as_file_peer(const Peer& peer) {
        return {peer.id, peer.user, peer.card->fingerprint};
    }
    std::optional<FilePeer> reach(const std::string& user) override {
        Peer* peer = link_ ? link_->find(user) : nullptr;
        if (peer == nullptr || !is_settled(*peer) || !open_to(*peer)) return std::nullopt;
        return as_file_peer(*peer);
    }
    void send(LoginId to, std::uint32_t tag, Kind kind, ByteView body) override {
        Peer* peer = link_ ? link_->find(to) : nullptr;
        if (peer == nullptr || !open_to(*peer)) return;
        push(Send{to, Lane::interactive, tag, peer->sender->seal(Lane::interactive, kind, body)});
    }
    std::shared_ptr<BulkLane> bulk_lane(LoginId to) override {
        Peer* peer = link_ ? link_->find(to) : nullptr;
        if (peer == nullptr || !open_to(*peer)) return nullptr;
        if (!peer->bulk)
            peer->bulk =
                std::make_shared<detail::ConnectionBulkLane>(peer->sender, link_->connection, to);
        return peer->bulk;
    }
    void start(FileAttempt attempt) override { workers_->start(std::move(attempt)); }
    void ask(unsigned attempt, DiskRequest request) override {
        workers_->ask(attempt, std::move(request));
    }
    void stop(unsigned attempt, bool drop) override { workers_->stop(attempt, drop); }

    ClientOptions options_;
    const std::string user_, server_;

    detail::Mailbox mail_;  // any thread

    // The engine thread's own.
    detail::Login login_;
    std::unique_ptr<detail::Link> link_;
    std::uint32_t last_tag_ = 0;  // of this connection
    bool quit_sent_ = false;
    std::set<std::string> ignored_;
    std::map<std::string, Fingerprint> told_numbers_;  // whose key each SafetyNumber was of
    std::deque<Command> jobs_;                         // that wait, in their order
    std::map<std::uint64_t, Written> written_;
    std::uint64_t last_id_ = 0;       // of what was written
    std::uint64_t last_to_room_ = 0;  // of what was sent to everybody
    struct Coming {
        std::uint64_t run = 0;    // of the program of somebody who has come,
        std::uint64_t after = 0;  // and `last_to_room_` when it came
    };
    std::map<std::string, Coming> came_;
    Clock::time_point written_until_ = Clock::time_point::max();  // what waits in `written_`
    std::set<std::string> absent_;                                // see note_newcomer()
    Clock::time_point online_since_{};  // and has been waited for from then on
    struct Seen {
        ShownIds shown, hidden;
    };
    std::map<std::pair<std::string, Digest>, Seen> shown_;  // while the program runs
    std::deque<ReceiptDue> receipts_due_;
    std::uint64_t last_event_ = 0;  // the number of the newest one
    struct Oddities {
        std::uint64_t complaints = 0, gaps = 0, lost = 0;  // lost: not told yet
    };
    std::map<std::string, Oddities> oddities_;  // by who sent them
    bool verified_room_ = options_.verified_room;
    std::optional<Leave> leaving_;
    Clock::time_point leave_at_ = Clock::time_point::max();  // at the latest
    bool save_failed_ = false;
    std::optional<FileTransfers> files_;  // from the first login on
    bool somebody_came_ = false;          // for whom a file may wait
    std::optional<FileWorkers> workers_{std::in_place, [this] { mail_.waker.wake(); }};

    std::thread engine_;  // last, so that everything above exists when it starts; joined in ~Client
};

// ---- Try it -------------------------------------------------------------------------------------
//
// Break: pinned-before-proof (a man in the middle who fails leaves his key behind) and
// receipt-before-showing (a message is confirmed before anybody has seen it).
//
// Write /AWAY: after "/away back at five" each person who writes to you alone is answered, once,
// with "away: back at five". "/away" ends it, and a new one begins anew. (A command is a struct in
// Command, what it does a perform(), and what one types stands in chapter 13.) Two who are both
// away must not answer each other for ever.
// Green: exercise: away
//
// Write a SECOND ROOM: after "/enter tea" what you say to everybody is sent to those alone who are
// in tea, and what is said elsewhere is not sent to you. "/enter" goes back. The server need not be
// changed, and learns no name: it passes on to those who are named. So the clients tell each other
// where they are, in a sealed payload of a new Kind, 4; whoever comes later has to be told, too.
// What was typed just before "/enter" is said where one was then.
// Green: exercise: second room

// =================================================================================================
//  Chapter 13. For the programs
// =================================================================================================
//
// The protocol is complete without this chapter. Here is what a program around it needs as well,
// and what a terminal, a window and a script should do alike: ask for a password, show a size and a
// time as people read them, and understand what people type.
//
// What goes wrong where each program does this for itself: a password on the command line, which
// everybody on the machine can read in the list of processes; a terminal that stays mute after an
// interrupted question; "::1" that one program takes for a host and another for a port. A text from
// a person is parsed as strictly as one from the network, and what is wrong with it is said in a
// sentence that names what is right.
//
// A program is then short: flags become options, lines become commands, events become lines, each
// through visible() (chapter 1), and it decides about colours and prompts itself.

// ---- Where a password comes from ----------------------------------------------------------------
//
// Never from the command line: everybody on the machine can read that in the list of processes.

namespace detail {
// What each system does in its own way: chapter 14.
inline std::optional<SecretBytes> take_from_environment(const char* name);  // it is gone then
// Shows `prompt` and gives each key that is pressed to `handle`, until that returns false. Nothing
// is echoed, and no key is a signal; but Ctrl-Z still suspends. Throws Error(no_terminal).
inline void read_keys(std::string_view prompt, const std::function<bool(int key)>& handle);
inline constexpr const char* no_terminal =
    "There is no terminal to ask for the password. Give it in the environment, as "
    "CHATSECURE_PASSWORD, or to the client with --password-file.";
}  // namespace detail

// The first line of a file or, without a file, the environment's CHATSECURE_PASSWORD (which is then
// removed from the environment, so that no program started from here inherits it). Throws Error.
inline std::optional<SecretBytes> find_password(const std::filesystem::path& file) {
    if (!file.empty()) {
        std::optional<SecretBytes> content = read_file(file, 64 * 1024);
        if (!content) throw Error(concat("There is no password file ", file.string(), "."));
        auto begin = content->begin();
        if (as_text(*content).starts_with("\xef\xbb\xbf")) begin += 3;  // some editors' first bytes
        auto end = std::find_if(begin, content->end(),
                                [](std::uint8_t byte) { return byte == '\n' || byte == '\r'; });
        if (begin == end)
            throw Error(concat("The password file ", file.string(),
                               " has no password: that is its first line, which is empty."));
        return SecretBytes(begin, end);
    }
    return detail::take_from_environment("CHATSECURE_PASSWORD");
}

// Asks on the terminal, without echo. Throws Error if the user gives up (Ctrl-C, Ctrl-D) or if
// there is no terminal.
inline SecretBytes ask_password(std::string_view prompt) {
    SecretBytes password;
    bool given = false;
    detail::read_keys(prompt, [&](int key) {
        given = key == '\r' || key == '\n';
        if (given || key == 3 || key == 4) return false;
        if (key == 0x7f || key == '\b') {  // take back a character: all bytes of its UTF-8
            while (!password.empty() && (password.back() & 0xc0) == 0x80) password.pop_back();
            if (!password.empty()) password.pop_back();
        } else if (key == 0x15) {  // Ctrl-U
            password.clear();
        } else if (password.size() < max_password_bytes) {
            password.push_back(static_cast<std::uint8_t>(key));
        }
        return true;
    });
    if (!given) throw Error("No password was given.");
    return password;
}

// ---- Marks, colours, sizes and times ------------------------------------------------------------

// What stands beside a message that one has written.
inline const char* delivery_mark(Delivery state) {
    switch (state) {
        case Delivery::waiting:
            return "\u2026";  // three dots
        case Delivery::sent:
            return "\u2713";  // a tick
        case Delivery::delivered:
            return "\u2713\u2713";
        case Delivery::failed:
            return "!";
    }
    return "";
}

// Everybody has a colour, the same one in every program: the number of one of `colours`.
inline std::size_t person_colour(std::string_view user, std::size_t colours) {
    Digest digest = sha256(as_bytes(user));
    return (std::size_t{digest[0]} << 8 | digest[1]) % colours;
}

// The 60 digits of a safety number as two people read them to each other: four groups a row.
inline std::string safety_number_rows(std::string_view digits, std::string_view next_row = "\n") {
    constexpr std::size_t row = 4 * 6;  // five digits and a blank each
    std::string rows(digits.substr(0, row - 1));
    for (std::size_t at = row; at < digits.size(); at += row)
        rows += concat(next_row, digits.substr(at, row - 1));
    return rows;
}

// A number of bytes as people read it: "612 bytes", "4.10 kB", "1.25 GB" (powers of 1000, like a
// disk's label).
inline std::string readable_size(std::uint64_t bytes) {
    if (bytes < 1000) return concat(bytes, bytes == 1 ? " byte" : " bytes");
    double value = static_cast<double>(bytes);
    static constexpr std::array<std::string_view, 7> units{"bytes", "kB", "MB", "GB",
                                                           "TB",    "PB", "EB"};
    std::size_t unit = 0;
    for (; value >= 999.5 && unit + 1 < units.size(); ++unit) value /= 1000;
    std::ostringstream out;
    out.precision(value < 9.995 ? 2 : value < 99.95 ? 1 : 0);
    out << std::fixed << value << ' ' << units[unit];
    return out.str();
}

// How long `bytes` still take, as people read it: "6 s left", "12 min left", "2 h left". Empty if
// nothing moves.
inline std::string time_left(std::uint64_t bytes, double bytes_per_second) {
    if (bytes_per_second < 1) return "";
    double left = static_cast<double>(bytes) / bytes_per_second;
    auto seconds = static_cast<std::uint64_t>(std::min(left, 1e9)) + 1;
    if (seconds < 100) return concat(seconds, " s left");
    if (seconds < 6000) return concat(seconds / 60, " min left");
    return concat(seconds / 3600, " h left");
}

// How many of `parts` parts of a file are done.
inline std::size_t parts_done(std::uint64_t done, std::uint64_t size, double parts) {
    double whole = static_cast<double>(std::max<std::uint64_t>(size, 1));
    return static_cast<std::size_t>(static_cast<double>(done) / whole * parts);
}

// How far a file is that is on its way: "43 % of 12.3 MB, 1.2 MB/s, 6 s left".
inline std::string progress_text(const FileEvent& e) {
    std::string left = time_left(e.file.size - e.done, e.bytes_per_second);
    if (e.phase == FileEvent::Phase::progress && e.bytes_per_second == 0)
        return concat(parts_done(e.done, e.file.size, 100), " % of ", readable_size(e.file.size),
                      ", nothing moves at the moment");
    return concat(parts_done(e.done, e.file.size, 100), " % of ", readable_size(e.file.size), ", ",
                  readable_size(static_cast<std::uint64_t>(e.bytes_per_second)), "/s",
                  left.empty() ? "" : ", ", left);
}

// "alice, bob, carol"
inline std::string listed(const std::vector<std::string>& names) {
    std::string text;
    for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
    return text;
}

// The number of bytes that a text means: "4096", "500k", "2M", "1.5G" (powers of 1000, too; a B may
// follow). Throws Error.
inline std::uint64_t parse_size(std::string_view text) {
    std::size_t end = std::min(text.find_first_not_of("0123456789."), text.size());
    std::istringstream number{std::string(text.substr(0, end))};
    number.imbue(std::locale::classic());  // a point is a point, whatever the user's language
    double value = 0;
    bool is_number = number >> value && number.eof();
    std::string_view rest = text.substr(end);
    if (rest.size() > 1 && rest[0] == ' ') rest.remove_prefix(1);
    std::size_t power = rest.empty()
                            ? std::string_view::npos
                            : std::string_view("kmgt").find(static_cast<char>(rest[0] | 0x20));
    if (power != std::string_view::npos) rest.remove_prefix(1);
    if (rest == "B" || rest == "b") rest = {};
    if (!is_number || !rest.empty())
        throw Error(concat("\"", visible(text.substr(0, 40)),
                           "\" is no size: give a number of bytes, like 4096, 500k, 2M or 1.5G."));
    for (; power != std::string_view::npos; --power) value *= 1000;  // k is 0: once
    return value >= 1.8e19 ? UINT64_MAX : static_cast<std::uint64_t>(value);
}

// ---- Text in rows, for a terminal ---------------------------------------------------------------

namespace detail {
inline int columns_of(char32_t point);  // of a letter on a terminal; chapter 14
}  // namespace detail

// Text of several lines, each made visible().
inline std::string visible_lines(std::string_view text) {
    std::string lines;
    for (std::size_t end; (end = text.find('\n')) != text.npos; text.remove_prefix(end + 1))
        lines += concat(visible(text.substr(0, end)), "\n");
    return lines + visible(text);
}

// Calls `use` with the bytes of each letter of `text`, and the columns that it takes: two for a
// Chinese one, none for an accent. What sets a colour takes none either.
inline void for_each_letter(std::string_view text,
                            const std::function<void(std::string_view, std::size_t)>& use) {
    while (!text.empty()) {
        std::string_view rest = text;
        char32_t point = take_code_point(rest);
        std::size_t used = text.size() - rest.size();
        if (point == U'\x1b') used = std::min(text.find('m'), text.size() - 1) + 1;
        use(text.substr(0, used), static_cast<std::size_t>(std::max(detail::columns_of(point), 0)));
        text.remove_prefix(used);
    }
}

// `text` in rows of at most `width` columns: broken between words, and where it has a line's end.
// All but the first begin in column `indent`. A word that is longer than a row is left to the
// terminal, which knows that it is one (an address on the web, to be clicked on).
inline std::string in_rows(std::string_view text, std::size_t width, std::size_t indent) {
    const std::string next = "\n" + std::string(indent, ' ');
    std::string rows, word;             // a word has the blank before it
    std::size_t column = 0, cells = 0;  // where `rows` ends; what `word` takes
    auto put_word = [&] {
        if (column > indent && column + cells > width) {
            bool blank = word.starts_with(' ');
            rows += next + word.substr(blank ? 1 : 0);
            column = indent + cells - (blank ? 1 : 0);
        } else {
            rows += word;
            column += cells;
        }
        word.clear();
        cells = 0;
    };
    for_each_letter(text, [&](std::string_view letter, std::size_t takes) {
        if (letter == "\n" || letter == " ") put_word();
        if (letter == "\n") {
            rows += next;
            column = indent;
        } else {
            word += letter;
            cells += takes;
        }
    });
    put_word();
    return rows;
}

// As much of `text` as fits into `width` columns, with all of its colours.
inline std::string first_columns(std::string_view text, std::size_t width) {
    std::string part;
    for_each_letter(text, [&](std::string_view letter, std::size_t cells) {
        if (cells <= width) part += letter;
        width -= std::min(cells, width);
    });
    return part;
}

// How many rows below its first `text`, which begins in the first column, ends. A terminal goes to
// the next row when there is something to put there; a line editor may make it go `at_once` when
// a row is full.
inline std::size_t rows_down(std::string_view text, std::size_t width, bool at_once) {
    std::size_t row = 0, column = 0;
    for_each_letter(text, [&](std::string_view letter, std::size_t cells) {
        bool fits = column + cells <= width && letter != "\n";
        column = fits ? column + cells : cells;
        bool full = at_once && column == width;
        row += (fits ? 0u : 1u) + (full ? 1u : 0u);
        if (full) column = 0;
    });
    return row;
}

// ---- Addresses and keys -------------------------------------------------------------------------

// "HOST", "HOST:PORT", "[IPV6]:PORT" or a bare IPv6 address, taken apart, in small letters. Throws
// Error.
struct HostPort {
    std::string host;
    std::uint16_t port = 0;
};
inline HostPort parse_host_port(std::string_view text, std::uint16_t default_port) {
    auto wrong = [&](const std::string& what) {
        return Error(concat("\"", visible(text), "\" ", what));
    };
    if (text.find("://") != text.npos)
        throw wrong("is an address of the web. A server's is HOST or HOST:PORT, without http://.");
    if (std::size_t at = text.find('@'); at != text.npos)
        throw wrong(concat("has a user in it: give the server alone, ",
                           visible(text.substr(at + 1)), ", and the user as such (-u ",
                           visible(text.substr(0, at)), ")."));
    std::string_view host = text, port;  // the port with its colon
    std::size_t colon = text.rfind(':');
    if (text.starts_with('[')) {
        std::size_t bracket = text.find(']');
        if (bracket == text.npos) throw wrong("lacks a closing ].");
        host = text.substr(1, bracket - 1);
        port = text.substr(bracket + 1);
        if (!port.empty() && port[0] != ':')
            throw wrong("is wrong: after ] comes : and the port, or nothing.");
    } else if (colon != text.npos && text.find(':') == colon) {  // one colon: HOST:PORT
        host = text.substr(0, colon);
        port = text.substr(colon);
    } else if (colon != text.npos && text.find("::") < colon - 1 && text.size() - colon > 4 &&
               parse_number<std::uint32_t>(text.substr(colon + 1))) {
        throw wrong(concat("may be an address with a port or without one. Write [",
                           visible(text.substr(0, colon)), "]", visible(text.substr(colon)),
                           ", or [", visible(text), "]."));
    }
    if (host.empty()) throw wrong("has no host name.");
    std::string name = lower_case(host);  // LOCALHOST is localhost: one host, one pin
    if (port.empty()) return {name, default_port};
    if (port == ":") throw wrong("lacks a port after the colon.");
    port.remove_prefix(1);
    std::uint16_t number = parse_number<std::uint16_t>(port).value_or(0);
    if (number == 0)
        throw Error(
            concat("\"", visible(port), "\" is not a port: give a number from 1 to 65535."));
    return {name, number};
}

// The number that a flag was given. Throws Error, which names the flag and what is right.
template <std::unsigned_integral T>
T number_for(std::string_view flag, std::string_view text, T least, T most) {
    std::optional<T> number = parse_number<T>(text);
    if (!number || *number < least || *number > most)
        throw Error(concat(flag, " takes a number from ", least, " to ", most, ", and not \"",
                           visible(text), "\"."));
    return *number;
}

// The directory that a flag was given. Throws Error for none.
inline std::filesystem::path directory_for(std::string_view flag, const std::string& text) {
    if (text.empty())
        throw Error(concat(flag, " takes a directory, and not nothing: \".\" is this one."));
    return path_of(text);
}

// A fingerprint as text, or the fingerprint of the key in a PEM file. Throws Error.
inline Fingerprint fingerprint_from(const std::string& file_or_fingerprint) {
    if (file_or_fingerprint.starts_with("SHA256:")) return Fingerprint::parse(file_or_fingerprint);
    std::optional<SecretBytes> pem = read_file(path_of(file_or_fingerprint), max_key_file_bytes);
    if (!pem)
        throw Error(concat("There is no key file ", file_or_fingerprint,
                           ". Give the server's server_public.pem, or its fingerprint SHA256:..."));
    return RsaPublicKey::from_pem(*pem, file_or_fingerprint).fingerprint();
}

// ---- What the system allows ---------------------------------------------------------------------

// Every connection needs a descriptor, and the usual soft limit is 1024. Raises it to what the
// system allows this process; returns the limit in force.
inline std::size_t raise_descriptor_limit();  // chapter 14

// For a program with a thread for each of a thousand connections, once, when it starts. glibc gives
// its threads up to eight heaps for each processor, and what one of them keeps for the next burst,
// no other can use.
inline void share_one_heap();

// For a program, when it starts: writing what cannot be written (to a pipe that nobody reads, over
// a limit on the size of files) is an error like any other, not a signal that kills.
inline void make_write_errors_errors();

// For a program, first of all. Who starts it may have closed its standard input, output or error:
// the system gives the lowest free number to whatever is opened next, and what was meant for the
// screen would go into a key file or to the server. From here on all three are something.
inline void open_standard_descriptors();

// What the program was called with, in UTF-8, whatever main() was given.
inline char** arguments_in_utf8(int argc, char** argv);

// Calls `handler` with SIGINT or SIGTERM when somebody asks the program to end; perhaps beside the
// other threads, or in a signal handler: it may do what is allowed there.
inline void when_asked_to_end(void (*handler)(int signal));

// Whether standard input (0), output (1) or error (2) is a terminal; and how large that of the
// output is, with the names that POSIX gives to rows and columns.
inline bool is_terminal(int descriptor);
struct TerminalSize {
    unsigned short ws_row = 24, ws_col = 80;
};
inline TerminalSize terminal_size();

inline std::tm local_time(std::time_t time);

// As a clock or a calendar on the wall says it; `format` is that of strftime().
inline std::string time_text(std::chrono::system_clock::time_point time, const char* format) {
    std::tm local = local_time(std::chrono::system_clock::to_time_t(time));
    std::array<char, 64> text{};
    std::strftime(text.data(), text.size(), format, &local);
    return text.data();
}

// Waits until standard input has something (if `want_input`), or `waker` was woken, or
// `timeout_ms` is over (-1: never).
struct Readiness {
    bool input = false;
    bool output_gone = false;  // nobody reads standard output any more; it need not be noticed
};
inline Readiness wait_for_input(Waker& waker, bool want_input, int timeout_ms);

// ---- What is worth a line -----------------------------------------------------------------------

// Our messages that wait, and those that have waited: what becomes of them is news.
class LateMessages {
  public:
    // True if the message had been waiting before this.
    bool note(const DeliveryChanged& e) {
        using enum Delivery;
        auto found = waits_.find(e.id);
        bool late = found != waits_.end();
        if (e.state == waiting)
            waits_[e.id] = true;
        else if (late && e.state == sent && !e.to.empty())
            found->second = false;
        else if (late)
            waits_.erase(found);
        return late;
    }
    std::size_t waiting() const {
        return static_cast<std::size_t>(std::count_if(
            waits_.begin(), waits_.end(), [](const auto& entry) { return entry.second; }));
    }

  private:
    std::map<std::uint64_t, bool> waits_;  // by id: does it wait now?
};

// Lets one progress event of each file through every few seconds (and all other events), for front
// ends that print lines.
class NowAndThen {
  public:
    bool is_due(const Event& event) {
        const auto* file = std::get_if<FileEvent>(&event.what);
        if (file == nullptr || file->phase != FileEvent::Phase::progress) return true;
        Clock::time_point now = Clock::now();
        auto [last, first] = last_.try_emplace(file->file.number, now);
        if (first || now - last->second < std::chrono::seconds(5)) return false;
        last->second = now;
        return true;
    }

  private:
    std::map<unsigned, Clock::time_point> last_;
};

// ---- Lines of input, for every front end alike --------------------------------------------------

// Standard input, line by line, as far as they are there.
namespace detail {
inline std::ptrdiff_t read_input(ByteSpan into);  // read_some() of it; chapter 14
}  // namespace detail

class LineReader {
  public:
    // Reads what is there; blocks if nothing is.
    void read_more() {
        Bytes block(65536);
        std::ptrdiff_t got = detail::read_input(block);
        if (got > 0) buffer_ += as_text(ByteView(block).first(static_cast<std::size_t>(got)));
        if (got == 0 || (got < 0 && errno != EINTR)) ended_ = true;
    }
    // The next line without its end; at the end of the input also a last one that has no end.
    std::optional<std::string> next() {
        std::size_t end = buffer_.find('\n', begin_);
        if (end == buffer_.npos && (!ended_ || begin_ == buffer_.size())) {
            buffer_.erase(0, std::exchange(begin_, 0));
            return std::nullopt;
        }
        std::string line = buffer_.substr(begin_, end - begin_);
        begin_ = end == buffer_.npos ? buffer_.size() : end + 1;
        if (line.ends_with('\r')) line.pop_back();
        return line;
    }
    bool ended() const { return ended_ && begin_ == buffer_.size(); }
    bool wants_more() const { return !ended_; }

  private:
    std::string buffer_;
    std::size_t begin_ = 0;
    bool ended_ = false;
};

struct CommandHelp {
    std::string_view usage, meaning;
};
inline constexpr std::array<CommandHelp, 15> command_help{{
    {"TEXT", "to everybody (begin with // for a text that begins with /)"},
    {"/msg USER TEXT", "to one person"},
    {"/reply TEXT", "to whom you last exchanged private messages with"},
    {"/who", "who is online"},
    {"/verify USER",
     "the safety number to compare; \"/verify USER ok\" when it agrees, \"no\" ends that"},
    {"/trust USER", "accept the new identity of somebody whose identity has changed"},
    {"/ignore USER", "hide what somebody writes and offers; again to show it"},
    {"/room verified", "write to everybody you have verified only; \"/room everyone\" ends that"},
    {"/file USER PATH...", "offer files to somebody; quote a path that has blanks"},
    {"/accept [N] [NAME]", "take an offered file, under another name if one is given"},
    {"/decline [N]", "do not take it"},
    {"/cancel [N]", "withdraw an offer, or stop a file that is on its way"},
    {"/files", "the files that are offered and on their way, with their numbers"},
    {"/help [COMMAND]", "this list, or one line of it"},
    {"/quit", "leave"},
}};

// A path as people type it, or as a desktop copies it: perhaps with ~ for home, perhaps
// "file:///tmp/a%20b" (RFC 8089).
inline std::filesystem::path path_from(std::string_view text) {
    const char* home = std::getenv("HOME");
    if (text.starts_with("~/") && home != nullptr)
        return std::filesystem::path(home) / path_of(text.substr(2));
    std::string_view rest = text;
    for (std::string_view prefix : {"file://localhost", "file://"})
        if (rest.starts_with(prefix)) rest.remove_prefix(prefix.size());
    if (!rest.starts_with('/') || rest.size() == text.size()) return path_of(text);
    std::string decoded;
    for (; !rest.empty(); rest.remove_prefix(1)) {
        unsigned byte = 0;
        if (rest[0] == '%' && rest.size() > 2 &&
            std::from_chars(rest.data() + 1, rest.data() + 3, byte, 16).ptr == rest.data() + 3 &&
            byte != 0) {
            decoded += static_cast<char>(byte);
            rest.remove_prefix(2);
        } else {
            decoded += rest[0];
        }
    }
    // "/C:/a" is "C:/a", where drives have letters.
    if (std::filesystem::path::preferred_separator == '\\' && decoded.find(':') == 2)
        decoded.erase(0, 1);
    return path_of(decoded);
}

// The address of a file (RFC 8089), for a desktop to open; path_from() is the way back.
inline std::string file_address(const std::filesystem::path& path) {
    std::string text = std::filesystem::absolute(path).generic_string();
    std::string address = text.starts_with('/') ? "file://" : "file:///";  // of a drive: C:/
    for (char c : text) {
        bool safe = c == '/' || (c > 0 && std::isalnum(c) != 0);
        address += safe ? std::string(1, c) : "%" + to_hex(as_bytes(std::string_view(&c, 1)));
    }
    return address;
}

// Several paths, as people type them, or as a terminal pastes files that are dropped on it: with
// blanks between them, and blanks in a name quoted or behind a backslash. What as a whole is the
// name of something, blanks and all, is that one path; so is what begins with no such name.
inline std::vector<std::filesystem::path> paths_from(std::string_view text) {
    while (text.ends_with(' ')) text.remove_suffix(1);
    auto exists = [](const std::filesystem::path& path) {
        std::error_code failure;
        return std::filesystem::exists(path, failure);
    };
    std::filesystem::path whole = path_from(text);
    if (exists(whole)) return {whole};
    constexpr bool has_escapes = std::filesystem::path::preferred_separator != '\\';
    std::vector<std::filesystem::path> paths;
    std::string word;
    char quote = 0;
    bool in_word = false;
    auto end_word = [&] {
        if (std::exchange(in_word, false)) paths.push_back(path_from(std::exchange(word, {})));
    };
    for (std::size_t i = 0; i < text.size(); ++i) {
        char c = text[i];
        if (c == ' ' && quote == 0) {
            end_word();
            continue;
        }
        in_word = true;
        if (c == quote)
            quote = 0;
        else if (quote == 0 && (c == '"' || c == '\''))
            quote = c;
        else if (quote == 0 && c == '\\' && has_escapes && i + 1 < text.size())
            word += text[++i];
        else
            word += c;
    }
    end_word();
    bool is_whole = quote != 0 || (paths.size() > 1 && !exists(paths.front()));
    return is_whole ? std::vector{whole} : paths;
}

// The command that a line is about, in small letters: "/msg" for "  /MSG bob hi". Empty for a text.
inline std::string command_of(std::string_view line) {
    line.remove_prefix(std::min(line.find_first_not_of(" \t"), line.size()));
    if (!line.starts_with('/') || line.starts_with("//")) return "";
    return lower_case(line.substr(0, line.find_first_of(" \n")));
}

// True for "/help", and for "/help " as completion leaves it.
inline bool is_command(std::string_view line, std::string_view command) {
    return command_of(line) == command && split_words(line).size() == 1;
}

namespace detail {

// How many letters one has to insert, remove or replace to make one word the other (Levenshtein).
inline std::size_t edit_distance(std::string_view one, std::string_view other) {
    std::vector<std::size_t> row(other.size() + 1);  // from the beginning of `one` so far, to each
    for (std::size_t j = 0; j < row.size(); ++j) row[j] = j;
    for (std::size_t i = 0; i < one.size(); ++i) {
        std::size_t diagonal = std::exchange(row[0], i + 1);
        for (std::size_t j = 0; j < other.size(); ++j) {
            std::size_t replaced = diagonal + (one[i] == other[j] ? 0 : 1);
            diagonal = row[j + 1];
            row[j + 1] = std::min({replaced, diagonal + 1, row[j] + 1});
        }
    }
    return row.back();
}

// What is wrong with a command that does not exist, and which one may have been meant.
inline Error no_such_command(std::string_view command) {
    std::string nearest;
    std::size_t least = 3;  // at most two letters are wrong, and at most half of them
    for (const CommandHelp& help : command_help) {
        std::string_view name = help.usage.substr(0, help.usage.find(' '));
        if (!name.starts_with('/')) continue;
        std::size_t distance = edit_distance(command, name);
        if (command.size() > 2 && name.starts_with(command)) distance = 0;
        if (std::is_permutation(command.begin(), command.end(), name.begin(), name.end()))
            distance = 1;
        if (distance >= std::min(least, (name.size() - 1) / 2 + 1)) continue;
        nearest = name;
        least = distance;
    }
    return Error(concat("There is no command ", visible(command.substr(0, 40)), ". ",
                        nearest.empty() ? "" : concat("Did you mean ", nearest, "? "),
                        "/help lists them."));
}

}  // namespace detail

// What there is to show for a line that asks for help: for "/help" all commands, for "/help msg"
// one. Nothing for any other line; throws Error for a command that does not exist.
inline std::vector<CommandHelp> help_asked(std::string_view line) {
    std::vector<CommandHelp> found;
    if (command_of(line) != "/help") return found;
    std::vector<std::string> words = split_words(line);
    if (words.size() == 1) return {command_help.begin(), command_help.end()};
    std::string command = lower_case(words[1]);
    if (!command.starts_with('/')) command.insert(0, "/");
    for (const CommandHelp& help : command_help)
        if (help.usage.substr(0, help.usage.find(' ')) == command) found.push_back(help);
    if (found.empty()) throw detail::no_such_command(command);
    return found;
}

// A part of a text, in bytes.
struct Span {
    std::size_t begin = 0, end = 0;
};

// Where the links of a text are. Only what a browser takes, and only ASCII: a letter of another
// alphabet in an address may look like one of ours and lead elsewhere.
inline std::vector<Span> find_links(std::string_view text) {
    std::vector<Span> links;
    for (std::size_t at = 0; (at = text.find("http", at)) != text.npos;) {
        std::string_view rest = text.substr(at);
        std::size_t host = rest.starts_with("https://") ? 8 : rest.starts_with("http://") ? 7 : 0;
        auto ends = [](char c) { return c <= ' ' || c > '~' || c == '<' || c == '>' || c == '"'; };
        auto size =
            static_cast<std::size_t>(std::find_if(rest.begin(), rest.end(), ends) - rest.begin());
        while (size > 0 && std::string_view(".,;:!?)]}'").find(rest[size - 1]) != text.npos) --size;
        if (host > 0 && size > host) links.push_back({at, at + size});
        at += std::max<std::size_t>(size, 4);
    }
    return links;
}

// How what is being typed may go on: the words that may be meant, and what can be inserted without
// a choice, which is what they all begin with, beyond what is there.
struct Completion {
    std::vector<std::string> words{};
    std::string insert{};

    Completion(std::string_view begun, std::vector<std::string> candidates)
        : words(std::move(candidates)) {
        std::erase_if(words, [&](const std::string& word) { return !word.starts_with(begun); });
        if (words.empty()) return;
        std::string common = words[0];
        for (const std::string& other : words)
            while (!other.starts_with(common)) common.pop_back();
        while (!utf8_length(common) && common.size() > begun.size()) common.pop_back();
        insert = common.substr(begun.size());
    }
};

inline constexpr std::string_view path_separators =
    std::filesystem::path::preferred_separator == '/' ? "/" : "/\\";

// Completes a path; folders end with "/" and come first. Reads the folder; one that cannot be read
// has no files.
inline Completion complete_path(std::string_view begun) {
    std::size_t name = begun.find_last_of(path_separators) + 1;  // npos + 1 is 0
    std::string folder(begun.substr(0, name));
    std::vector<std::string> files, folders;
    std::error_code failure;
    std::filesystem::directory_iterator entry(path_from(folder.empty() ? "./" : folder), failure);
    for (; !failure && entry != std::filesystem::directory_iterator(); entry.increment(failure)) {
        std::u8string utf8 = entry->path().filename().u8string();
        std::string file(utf8.begin(), utf8.end());
        if (name == begun.size() && file.starts_with('.')) continue;  // only if one asks for them
        std::error_code unknown;
        if (entry->is_directory(unknown))
            folders.push_back(concat(folder, file, "/"));
        else
            files.push_back(folder + file);
    }
    for (std::vector<std::string>* names : {&folders, &files})
        std::sort(names->begin(), names->end(), [](const auto& one, const auto& other) {
            return lower_case(one) < lower_case(other);
        });
    folders.insert(folders.end(), files.begin(), files.end());
    return {begun, std::move(folders)};
}

// Completes the word at the end of `before`: a command at the beginning of a line, a path behind
// "/file USER", one of the `names` everywhere else. A blank follows the only word that fits.
inline Completion complete(std::string_view before, const std::vector<std::string>& names) {
    std::string_view word = before.substr(before.find_last_of(" \n") + 1);  // npos + 1 is 0
    auto completed = [&]() -> Completion {
        if (before.starts_with("/file ") && before.find(' ', 6) != before.npos)
            return complete_path(word);
        if (before.empty()) return {word, {}};
        if (!before.starts_with('/') || before != word) return {word, names};
        std::vector<std::string> commands;
        for (const CommandHelp& help : command_help)
            commands.emplace_back(help.usage.substr(0, help.usage.find(' ')));
        return {word, std::move(commands)};
    };
    Completion found = completed();
    if (found.words.size() == 1 && !found.words[0].ends_with('/')) found.insert += ' ';
    return found;
}

// Whether a text speaks of `user`: has the name in it as a word, in large letters or small ones.
inline bool mentions(std::string_view text, std::string_view user) {
    std::string lower = lower_case(text);
    auto ends_word = [&](std::size_t at) {
        auto c = static_cast<std::uint8_t>(at < lower.size() ? lower[at] : ' ');
        return !((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c >= 0x80);
    };
    for (std::size_t at = lower.find(user); at != lower.npos; at = lower.find(user, at + 1))
        if ((at == 0 || ends_word(at - 1)) && ends_word(at + user.size())) return true;
    return false;
}

// What a line means. Nothing for an empty line; throws Error with the sentence to show for a line
// that cannot be done. Blanks before a command do not make it a text: what was meant for one person
// must not go to all. A message may have several lines (they were pasted), a command has one.
// `reply_to` is the last private partner, or empty. Commands that concern the front end alone
// (/help) are its own to catch before.
inline std::optional<Command> parse_command(std::string_view line, std::string_view reply_to) {
    auto checked = [](std::string_view text) {
        require_sendable(text);
        return std::string(text);
    };
    std::size_t begin = line.find_first_not_of(" \t\r\n");
    if (begin == line.npos) return std::nullopt;
    const std::string command = command_of(line);
    if (command.empty()) {
        bool escaped = line.substr(begin).starts_with("//");
        return Say{checked(line.substr(escaped ? begin + 1 : 0))};
    }
    line.remove_prefix(begin);
    if (line.find('\n') != line.npos && command != "/msg" && command != "/reply")
        throw Error(
            "A line that begins with / is a command, and a command has one line. Begin with // for "
            "a text. Nothing was done.");

    auto take_word = [&line] {
        std::size_t end = std::min(line.find(' '), line.size());
        std::string_view word = line.substr(0, end);
        line.remove_prefix(std::min(line.find_first_not_of(' ', end), line.size()));
        return word;
    };
    take_word();
    auto need = [&](bool ok, std::string_view usage) {
        if (!ok) throw Error(concat("Usage: ", usage));
    };
    if (command == "/msg") {
        std::string_view user = take_word();
        need(!user.empty() && !line.empty(), "/msg USER TEXT");
        return Tell{fold_name(user), checked(line)};
    }
    if (command == "/reply") {
        need(!line.empty(), "/reply TEXT");
        if (reply_to.empty()) throw Error("There is nobody to reply to yet.");
        return Tell{std::string(reply_to), checked(line)};
    }
    need(command != "/help", "/help");  // with something after it
    if (command == "/who" || command == "/quit" || command == "/files") {
        need(line.empty(), concat(command, ", with nothing behind it"));
        if (command == "/who") return ListPeople{};
        if (command == "/files") return ListFiles{};
        return Leave{};
    }
    if (command == "/room") {
        std::string_view who = take_word();
        need((who == "verified" || who == "everyone") && line.empty(),
             "/room verified, or /room everyone");
        return LimitRoom{who == "verified"};
    }
    if (command == "/file") {
        std::string_view user = take_word();
        need(!user.empty() && !line.empty(), "/file USER PATH...");
        return SendFile{fold_name(user), paths_from(line)};
    }
    if (command == "/accept" || command == "/decline" || command == "/cancel") {
        std::string_view rest = line, word = take_word();
        unsigned number = parse_number<unsigned>(word).value_or(0);
        bool is_number = number > 0;
        if (command == "/accept") return AcceptFile{number, std::string(is_number ? line : rest)};
        need(word.empty() || (is_number && line.empty()), concat(command, " [NUMBER]"));
        if (command == "/decline") return DeclineFile{number};
        return CancelFile{number};
    }
    if (command == "/verify" || command == "/trust" || command == "/ignore") {
        std::string_view user = take_word();
        bool ok = command == "/verify" && line == "ok", no = command == "/verify" && line == "no";
        need(!user.empty() && (line.empty() || ok || no), concat(command, " USER"));
        if (ok || no) return Verify{fold_name(user), ok};
        if (command == "/verify") return Verify{fold_name(user)};
        if (command == "/trust") return Trust{fold_name(user)};
        return Ignore{fold_name(user)};
    }
    throw detail::no_such_command(command);
}

// ---- The glass box: --trace ---------------------------------------------------------------------
//
// What a Tracer is told (chapter 1), cut into named pieces and explained. Each message and each
// kind of payload is a line of a table; its fields are found by the same function `fields` that
// writes and reads them, so the tables hold names and nothing else.

struct TracePiece {
    std::string name;
    ByteView bytes;
    std::string value;    // where the bytes alone are hard to read: a number, a text
    bool secret = false;  // shown with --trace-secrets only
};
struct TraceStory {
    std::string title;
    std::string meaning;
    std::vector<TracePiece> outside, inside;  // what travels, and what one holds who has the key
};

namespace detail {

// Takes the fields of a value, like a Reader, and notes each with its name.
class PieceReader {
  public:
    PieceReader(ByteView in, std::string_view names, std::vector<TracePiece>& out)
        : in_(in), names_(split_words(names)), out_(out) {}

    template <class... Field>
    PieceReader& operator()(const Field&... field) {
        (take(field), ...);
        return *this;
    }
    // The next bytes, which stay where they are. Throws ProtocolError if there are fewer.
    ByteView next_bytes(std::size_t size) const {
        if (size > in_.size()) throw ProtocolError("cut short");
        return in_.first(size);
    }
    // A piece of this size; or of all that is left.
    void piece(std::size_t size, std::string name, std::string value = {}) {
        constexpr std::array secrets{"ticket", "verifier", "proof", "server_final", "key"};
        bool secret = std::find(secrets.begin(), secrets.end(), name) != secrets.end();
        out_.push_back({std::move(name), next_bytes(size), std::move(value), secret});
        in_ = in_.subspan(size);
    }
    void rest(std::string name, std::string value = {}) {
        if (!in_.empty()) piece(in_.size(), std::move(name), std::move(value));
    }
    void number(std::size_t size, std::string name) {
        std::uint64_t value = 0;
        for (std::uint8_t byte : next_bytes(size)) value = value << 8 | byte;
        last_number_ = value;
        piece(size, std::move(name), std::to_string(value));
    }
    void text(std::size_t size, const std::string& name) {
        std::string_view all = as_text(next_bytes(size));
        // Whoever has this and users.db has the ClientKey: chapter 6.
        std::size_t proof = std::min(name == "text" ? all.find(",p=") : all.npos, all.size());
        piece(proof, name, quoted(all.substr(0, proof)));
        if (proof < size) piece(size - proof, "proof", quoted(all.substr(proof)));
    }
    void sealed(bool numbered, const std::string& of = "") {
        if (numbered) number(8, of + "seq");
        if (in_.size() >= gcm_tag_bytes) piece(in_.size() - gcm_tag_bytes, of + "ciphertext");
        rest(of + "tag");
    }
    std::size_t left() const { return in_.size(); }
    static std::string quoted(std::string_view text) { return concat('"', visible(text), '"'); }

  private:
    template <class Number>
    requires(std::unsigned_integral<Number> || std::is_enum_v<Number>) void take(const Number&) {
        number(sizeof(Number), next_name());
    }
    void take(const std::string&) {
        std::string name = next_name();
        number(2, "length of " + name);
        text(last_size(), name);
    }
    template <std::size_t N>
    void take(const std::array<std::uint8_t, N>&) {
        nested(next_name(), N);
    }
    void take(const Bytes&) { take(ByteView()); }
    void take(const ByteView&) {
        std::string name = next_name();
        number(4, "length of " + name);
        nested(name, last_size());
    }
    // Bytes that have fields themselves.
    void nested(const std::string& name, std::size_t size);
    // A length, which has 32 bits at most.
    std::size_t last_size() const { return static_cast<std::size_t>(last_number_); }

    std::string next_name() {
        return next_ < names_.size() ? names_[next_++] : "a field without a name";
    }

    ByteView in_;
    std::vector<std::string> names_;
    std::vector<TracePiece>& out_;
    std::size_t next_ = 0;
    std::uint64_t last_number_ = 0;
};

// A line of the tables.
struct Described {
    unsigned code;  // MessageType or Kind
    std::string_view name, fields, meaning;
    void (*take)(PieceReader&);
};
template <class T>
void take_fields(PieceReader& pieces) {
    T value{};
    T::fields(value, pieces);
}
template <class T>
constexpr Described described(std::string_view name, std::string_view fields,
                              std::string_view meaning) {
    if constexpr (requires { T::kind; })
        return {static_cast<unsigned>(T::kind), name, fields, meaning, take_fields<T>};
    else
        return {static_cast<unsigned>(T::type), name, fields, meaning, take_fields<T>};
}

inline constexpr Described described_messages[] = {
    described<Welcome>("Welcome", "server_version registration_open",
                       "whoever sealed this holds the key that was shown"),
    described<Goodbye>("Goodbye", "reason sentence", "everything before it was handled"),
    described<Ping>("Ping", "number", "are you still there?"),
    described<Pong>("Pong", "number", "I am"),
    described<Quit>("Quit", "", "a client leaves"),
    described<RegisterAccount>("RegisterAccount", "user verifier identity",
                               "what the server stores instead of a password"),
    described<Registered>("Registered", "", "the account is on the disk"),
    described<Scram>("Scram", "text ticket", "a step of the login"),
    described<LoginDone>("LoginDone", "server_final id identity ticket",
                         "both have proved that they know the account"),
    described<PublishCard>("PublishCard", "card", "a client's public keys, signed by itself"),
    described<Joined>("Joined", "id user", "somebody is here"),
    described<Ready>("Ready", "", "these were all who are here"),
    described<Left>("Left", "id", "somebody is gone"),
    described<GetCard>("GetCard", "id", "whose keys are these?"),
    described<CardOf>("CardOf", "id card", "as they were published"),
    described<Send>("Send", "to lane tag payload", "for one member"),
    described<Delivered>("Delivered", "from lane payload", "from one member"),
    described<Fanout>("Fanout", "tag text wrapped_keys", "one text, and its key for each member"),
    described<RoomDelivered>("RoomDelivered", "from text wrapped_key",
                             "the same text for everybody, the key for us"),
    described<Undelivered>("Undelivered", "to tag", "too much waits for that member"),
    described<Taken>("Taken", "tag", "every queue has it"),
};

// Kinds whose bodies are no structs.
struct DescribedText {
    static constexpr Kind kind = Kind::text;
    static void fields(auto&, auto& io) {
        io.number(8, "id");
        io.text(io.left(), "words");
    }
};
struct DescribedReceipt {
    static constexpr Kind kind = Kind::receipt;
    static void fields(auto&, auto& io) {
        while (io.left() > 0) io.number(8, "id");
    }
};
struct DescribedKey {
    static constexpr Kind kind = Kind::room_key;
    static void fields(auto&, auto& io) { io.rest("key"); }
};
inline constexpr Described described_kinds[] = {
    described<DescribedText>("Text", "id words", "a private message"),
    described<DescribedKey>("RoomKey", "key", "opens one room message"),
    described<DescribedReceipt>("Receipt", "id", "shown, says the reader"),
    described<FileOffer>("FileOffer", "id name size modified", "may I send this file?"),
    described<FileAccept>("FileAccept", "id offset held credit", "yes, from this byte on"),
    described<FileCredit>("FileCredit", "id credit", "so many bytes may be sent"),
    described<FileChunk>("FileChunk", "id offset bytes", "a piece of the file"),
    described<FileOver>("FileOver", "id by_sender why", "the transfer is over"),
};

// Notes what the line for `code` says of `body`. Nothing if there is no such line.
inline const Described* take_described(std::span<const Described> table, std::uint64_t code,
                                       ByteView body, std::vector<TracePiece>& out) {
    auto line = std::find_if(table.begin(), table.end(), [&](auto& l) { return l.code == code; });
    if (line == table.end()) return nullptr;
    PieceReader pieces(body, line->fields, out);
    line->take(pieces);
    return &*line;
}

inline void PieceReader::nested(const std::string& name, std::size_t size) {
    ByteView bytes = next_bytes(size);
    PieceReader inner(bytes,
                      name == "card" ? "user identity x25519 issued run signature"
                                     : "card encapsulated",  // of an Open
                      out_);
    if (name == "card" && size > 0) {
        take_fields<Card>(inner);
    } else if (name == "wrapped_keys") {
        while (inner.left() >= Fanout::entry_bytes) {
            inner.number(4, "for");
            inner.number(8, "seq");
            inner.piece(1 + 32, "ciphertext");
            inner.piece(gcm_tag_bytes, "tag");
        }
    } else if (name == "payload" && size > 0) {
        bool open = bytes[0] == static_cast<std::uint8_t>(PayloadType::open);
        inner.number(1, open ? "Open" : "Sealed");
        if (open)
            take_fields<OpenPayload>(inner);
        else
            inner.sealed(true);
    } else if (name == "text" || name == "wrapped_key") {
        inner.sealed(name == "wrapped_key", name + ": ");
    } else {
        inner.rest(name);
    }
    inner.rest("more");
    in_ = in_.subspan(size);
}

inline void explain_handshake(const TraceEvent& event, TraceStory& story) {
    constexpr std::string_view titles[] = {"ClientHello", "ServerHello", "ClientKey"};
    constexpr std::string_view meanings[] = {
        "a key that was made for this connection",
        "likewise; and the long-lived key, which the client compares with the one it knows",
        "32 random bytes that only the holder of the long-lived key can read"};
    auto which = static_cast<std::size_t>(std::min<std::uint64_t>(event.number - 1, 2));
    story.title = titles[which];
    story.meaning = meanings[which];
    PieceReader pieces(event.wire, "", story.outside);
    pieces.number(frame_header_bytes, "length");
    if (which == 2) return pieces.rest("encapsulated");
    pieces.text(protocol_magic.size(), "magic");
    pieces.piece(32, which == 0 ? "x25519_c" : "x25519_s");
    pieces.rest("server's RSA key");
}

inline void explain_sealed(const TraceEvent& event, TraceStory& story) {
    PieceReader pieces(event.wire, "", story.outside);
    if (event.layer == TraceEvent::Layer::record) {
        story.title = concat("record ", event.number);
        story.meaning = concat("sealed with the key \"", event.name, "\"");
        pieces.number(frame_header_bytes, "length");
        return pieces.sealed(false);
    }
    if (event.layer == TraceEvent::Layer::room_text) {
        story.title = "room message";
        story.meaning = "sealed once, for everybody, with a key of its own";
        pieces.sealed(false);
        take_described(described_kinds, static_cast<unsigned>(Kind::text), event.plain,
                       story.inside);
        return;
    }
    story.title = concat("payload ", event.number);
    story.meaning = concat("(", event.name, ")");
    pieces.sealed(true);
    PieceReader plain(event.plain, "", story.inside);
    plain.number(1, "kind");
    const Described* kind =
        take_described(described_kinds, event.plain[0], event.plain.subspan(1), story.inside);
    if (kind == nullptr) return;
    story.title += concat(": ", kind->name);
    story.meaning = concat(kind->meaning, " ", story.meaning);
}

inline void explain_message(const TraceEvent& event, TraceStory& story) {
    story.title = "an unknown message";
    PieceReader header(event.wire, "", story.outside);
    header.number(1, "type");
    header.number(4, "length");
    const Described* message =
        take_described(described_messages, event.number, event.plain, story.outside);
    if (message == nullptr) return;
    story.title = message->name;
    story.meaning = message->meaning;
}

inline void explain_layer(const TraceEvent& event, TraceStory& story) {
    using Layer = TraceEvent::Layer;
    switch (event.layer) {
        case Layer::stream:
            story.title = concat(event.wire.size(), " bytes");
            story.meaning = event.way == TraceEvent::Way::in ? "taken from the socket at once"
                                                             : "the socket took them at once";
            story.outside.push_back({"bytes", event.wire, {}, false});
            return;
        case Layer::handshake:
            return explain_handshake(event, story);
        case Layer::record:
        case Layer::payload:
        case Layer::room_text:
            return explain_sealed(event, story);
        case Layer::message:
            return explain_message(event, story);
        case Layer::secret:
            story.title = concat("secret: ", event.name);
            if (!event.wire.empty()) story.outside.push_back({"belongs to", event.wire, {}, false});
            story.inside.push_back({std::string(event.name), event.plain, {}, true});
            return;
    }
}

}  // namespace detail

// The views in it are of the event's bytes. Whatever the network can contain is explained as far as
// it makes sense.
inline TraceStory explain(const TraceEvent& event) {
    TraceStory story;
    std::string_view rest = "more";  // than belongs there
    try {
        detail::explain_layer(event, story);
    } catch (const ProtocolError&) {
        rest = "cut short";
    }
    auto complete = [&](std::vector<TracePiece>& pieces, ByteView all) {
        for (const TracePiece& piece : pieces) all = all.subspan(piece.bytes.size());
        if (!all.empty()) pieces.push_back({std::string(rest), all, {}, false});
    };
    if (event.layer != TraceEvent::Layer::secret) complete(story.outside, event.wire);
    if (!story.inside.empty()) complete(story.inside, event.plain);
    return story;
}

// A story as lines of text: what happened, then its pieces, `most` bytes of each. Without
// `secrets`, of what is secret the size alone.
inline std::string trace_text(const TraceEvent& event, std::string_view who, bool secrets,
                              std::size_t most = 32) {
    TraceStory story = explain(event);
    constexpr std::string_view ways[] = {"<-", "->", "--"};
    std::string text = concat(who, " ", ways[static_cast<int>(event.way)], " ", story.title,
                              story.meaning.empty() ? "" : "   # ", story.meaning, "\n");
    auto add = [&](const std::vector<TracePiece>& pieces, std::string_view indent) {
        for (const TracePiece& piece : pieces) {
            std::string name(piece.name);
            name.resize(std::max(name.size(), std::size_t{20}), ' ');
            text += concat(indent, name, " ");
            if (piece.secret && !secrets) {
                text += concat("(", piece.bytes.size(), " bytes: --trace-secrets shows them)");
            } else if (!piece.value.empty()) {
                text += piece.value;
            } else {
                text += to_hex(piece.bytes.first(std::min(most, piece.bytes.size())));
                if (piece.bytes.size() > most)
                    text += concat("... (", piece.bytes.size(), " bytes)");
            }
            text += '\n';
        }
    };
    add(story.outside, "    ");
    add(story.inside, "  | ");
    return text;
}

// Writes traces into one file, which the owner alone can read; "-" stands for standard error. An
// older file of that name is replaced.
class TraceLog {
  public:
    // Throws Error.
    TraceLog(const std::string& name, bool secrets) : secrets_(secrets) {
        if (name == "-") return;
        const std::filesystem::path path = path_of(name);
        std::error_code ignored;
        if (std::filesystem::is_regular_file(path, ignored)) std::filesystem::remove(path, ignored);
        file_ = detail::open_file(path, true, FileMode::owner_only);
        if (file_ < 0)
            throw Error(concat("Cannot write the trace ", name, ": ", system_reason(), "."));
    }
    ~TraceLog() {
        if (file_ >= 0) detail::close_file(file_);
    }
    TraceLog(const TraceLog&) = delete;
    TraceLog& operator=(const TraceLog&) = delete;

    // Any thread.
    void write(const TraceEvent& event, std::string_view who) {
        if (event.layer == TraceEvent::Layer::secret && !secrets_) return;
        const std::string story = trace_text(event, who, secrets_);
        std::lock_guard lock(mutex_);
        std::chrono::duration<double> since = Clock::now() - start_;
        std::ostringstream time;
        time << std::fixed << std::setprecision(6) << since.count();
        std::string text = concat(time.str(), " ", story, "\n");
        if (file_ < 0)
            std::cerr << text;
        else if (detail::write_all_at(file_, as_bytes(text), written_))
            written_ += text.size();
        else if (!std::exchange(failed_, true))
            std::cerr << "The trace ends here: " << system_reason() << ".\n";
    }

  private:
    const bool secrets_;
    const Clock::time_point start_ = Clock::now();
    std::mutex mutex_;  // guards everything below
    int file_ = -1;
    std::uint64_t written_ = 0;
    bool failed_ = false;
};

// For the flags --trace and --trace-secrets: a function that makes a Tracer for somebody, empty
// ones if no trace is wanted. Throws Error.
inline TracerFor tracer_from(const std::string& path, bool secrets) {
    if (path.empty() && secrets) throw Error("--trace-secrets belongs to --trace.");
    if (path.empty()) return [](std::string_view) { return Tracer(); };
    auto log = std::make_shared<TraceLog>(path, secrets);
    if (secrets)
        std::cerr << concat("WARNING: --trace-secrets writes the keys of this run into ",
                            path == "-" ? "standard error" : path,
                            ". Whoever reads that can read the whole conversation.\n");
    return [log](std::string_view who) {
        return [log, name = std::string(who)](const TraceEvent& event) { log->write(event, name); };
    };
}

// ---- Try it -------------------------------------------------------------------------------------
//
// Break: of chapter 1, terminal-driven (escape sequences of other people reach the terminal). What
// could somebody make of that, whose name is on your screen each day?
//
// Write a BOT, a program of your own in some thirty lines: dice.cpp, run as ./dice HOST PORT USER
// HOME, with the password in the environment (find_password). It logs in, taking the server's key
// as it comes; when somebody, say alice, writes "!dice" and nothing else to everybody, it says to
// everybody "alice rolled 4", and to whom asks in private it says it in private. It does not answer
// itself, and ends when the client is Stopped. (Is a random byte modulo 6 fair?) It stands beside
// ./tests, ./server and ./client.
//
//      g++ -std=c++20 -o dice dice.cpp -lcrypto -pthread
//
// Green: exercise: dice

// =================================================================================================
//  Chapter 14. Other systems
// =================================================================================================
//
// The standard library of C++ knows threads, clocks and paths, but no sockets, no terminal without
// echo, and no file that is synced to the disk. For these one asks the operating system, and there
// are two families of them: POSIX (Linux, macOS, the BSDs) and Windows. The chapters above declare
// what they need, in a line each; here stand the two versions.
//
// What goes wrong without such a place: #ifdef in the middle of a function, where nobody who has
// only one of the systems can see any more what the other one does.

#ifdef _WIN32

namespace detail {

// ---- Windows: files -----------------------------------------------------------------------------

// The system's last error becomes errno; returns -1.
inline int fail() {
    std::error_code error(static_cast<int>(::GetLastError()), std::system_category());
    errno = error.default_error_condition().value();
    return -1;
}
// A file that is open has no other name and does not go away, unless who has opened it agrees:
// FILE_SHARE_DELETE. The library's own functions never do.
inline int open_shared(const std::filesystem::path& path, DWORD access, DWORD creation, DWORD flags,
                       SECURITY_ATTRIBUTES* rights = nullptr) {
    HANDLE file =
        ::CreateFileW(path.c_str(), access, FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE,
                      rights, creation, flags, nullptr);
    if (file == INVALID_HANDLE_VALUE) return fail();
    return ::_open_osfhandle(reinterpret_cast<std::intptr_t>(file), _O_BINARY | _O_NOINHERIT);
}
inline HANDLE handle_of(int file) { return reinterpret_cast<HANDLE>(::_get_osfhandle(file)); }

// Lets our user in and nobody else, and takes over nothing from the folder. Empty if that fails.
inline SECURITY_ATTRIBUTES rights_of_owner() {
    SECURITY_ATTRIBUTES rights{sizeof rights, nullptr, FALSE};
    alignas(TOKEN_USER) std::array<std::uint8_t, 256> user{};
    HANDLE process = nullptr;
    DWORD size = user.size();
    wchar_t* name = nullptr;
    if (::OpenProcessToken(::GetCurrentProcess(), TOKEN_QUERY, &process) != 0 &&
        ::GetTokenInformation(process, TokenUser, user.data(), size, &size) != 0 &&
        ::ConvertSidToStringSidW(reinterpret_cast<TOKEN_USER*>(user.data())->User.Sid, &name) != 0)
        ::ConvertStringSecurityDescriptorToSecurityDescriptorW(
            (L"D:P(A;;FA;;;" + std::wstring(name) + L")").c_str(), SDDL_REVISION_1,
            &rights.lpSecurityDescriptor, nullptr);
    ::LocalFree(name);
    ::CloseHandle(process);
    return rights;
}
inline int open_file(const std::filesystem::path& path, bool create, FileMode mode) {
    if (!create) return open_shared(path, GENERIC_READ, OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL);
    static SECURITY_ATTRIBUTES owner = rights_of_owner();
    if (owner.lpSecurityDescriptor == nullptr) return errno = EACCES, -1;
    return open_shared(path, GENERIC_WRITE, CREATE_NEW, FILE_ATTRIBUTE_NORMAL,
                       mode == FileMode::owner_only ? &owner : nullptr);
}
inline void give_back_free_memory() {}
inline int close_file(int file) { return ::_close(file); }
inline int sync_file(int file) { return ::_commit(file); }
inline std::ptrdiff_t read_some(int file, ByteSpan into) {
    return ::_read(file, into.data(), static_cast<unsigned>(into.size()));
}
inline int rename_over(const std::filesystem::path& from, const std::filesystem::path& to) {
    const DWORD flags = MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH;
    return ::MoveFileExW(from.c_str(), to.c_str(), flags) != 0 ? 0 : fail();
}
inline bool sync_directory(const std::filesystem::path&) { return true; }  // see WRITE_THROUGH

// Directories cannot be locked: a file in it, which goes away with the process, stands for it.
inline std::intptr_t lock_directory(const std::filesystem::path& directory, bool wait,
                                    std::string_view busy) {
    std::filesystem::path file = directory / ".lock";
    const auto until = std::chrono::steady_clock::now() + lock_patience;
    for (;;) {
        HANDLE lock = ::CreateFileW(file.c_str(), GENERIC_WRITE, 0, nullptr, OPEN_ALWAYS,
                                    FILE_FLAG_DELETE_ON_CLOSE, nullptr);
        if (lock != INVALID_HANDLE_VALUE) return reinterpret_cast<std::intptr_t>(lock);
        DWORD reason = ::GetLastError();  // somebody has it, or is just giving it back?
        fail();
        if (reason != ERROR_SHARING_VIOLATION && reason != ERROR_ACCESS_DENIED)
            throw Error(concat("Cannot open the directory ", directory.string(), ": ",
                               system_reason(), "."));
        if (!wait || std::chrono::steady_clock::now() >= until) throw Error(std::string(busy));
        ::Sleep(10);
    }
}
inline void unlock_directory(std::intptr_t lock) { ::CloseHandle(reinterpret_cast<HANDLE>(lock)); }
inline bool may_write_into(const std::filesystem::path&) { return true; }  // writing will tell

// A directory can only be opened with "backup semantics": to be told from a file afterwards.
inline int open_to_send(const std::filesystem::path& path) {
    return open_shared(path, GENERIC_READ, OPEN_EXISTING, FILE_FLAG_BACKUP_SEMANTICS);
}
inline int open_part(const std::filesystem::path& path, bool create) {
    return open_shared(path, GENERIC_READ | GENERIC_WRITE, create ? CREATE_NEW : OPEN_EXISTING,
                       FILE_FLAG_OPEN_REPARSE_POINT);  // a link is not followed
}
// The system counts tenths of a microsecond since 1601.
inline constexpr std::uint64_t ticks_until_1970 = 116'444'736'000'000'000;
inline bool attributes_of(int file, FileAttributes& attributes) {
    BY_HANDLE_FILE_INFORMATION raw{};
    if (::GetFileInformationByHandle(handle_of(file), &raw) == 0) {
        fail();
        return false;
    }
    auto both = [](DWORD high, DWORD low) { return std::uint64_t{high} << 32 | low; };
    std::uint64_t time =
        both(raw.ftLastWriteTime.dwHighDateTime, raw.ftLastWriteTime.dwLowDateTime);
    bool directory = (raw.dwFileAttributes & FILE_ATTRIBUTE_DIRECTORY) != 0;
    bool link = (raw.dwFileAttributes & FILE_ATTRIBUTE_REPARSE_POINT) != 0;
    attributes = {!directory && !link && ::GetFileType(handle_of(file)) == FILE_TYPE_DISK,
                  directory, both(raw.nFileSizeHigh, raw.nFileSizeLow),
                  time <= ticks_until_1970 ? 0 : (time - ticks_until_1970) * 100};
    return true;
}
inline std::ptrdiff_t read_some_at(int file, ByteSpan into, std::uint64_t offset) {
    if (::_lseeki64(file, static_cast<std::int64_t>(offset), SEEK_SET) < 0) return -1;
    return read_some(file, into);
}
inline std::ptrdiff_t write_some_at(int file, ByteView bytes, std::uint64_t offset) {
    if (::_lseeki64(file, static_cast<std::int64_t>(offset), SEEK_SET) < 0) return -1;
    return ::_write(file, bytes.data(), static_cast<unsigned>(bytes.size()));
}
inline bool truncate_file(int file, std::uint64_t size) {
    return ::_chsize_s(file, static_cast<std::int64_t>(size)) == 0;
}
// What is locked cannot be read by others either: so it is a byte that no file has.
inline bool lock_file(int file) {
    OVERLAPPED where{};
    where.OffsetHigh = 0x7fff'ffff;
    return ::LockFileEx(handle_of(file), LOCKFILE_EXCLUSIVE_LOCK | LOCKFILE_FAIL_IMMEDIATELY, 0, 1,
                        0, &where) != 0 ||
           ::GetLastError() != ERROR_LOCK_VIOLATION;
}
inline void set_modified(int file, std::uint64_t nanoseconds) {
    std::uint64_t ticks = nanoseconds / 100 + ticks_until_1970;
    FILETIME time{static_cast<DWORD>(ticks), static_cast<DWORD>(ticks >> 32)};
    ::SetFileTime(handle_of(file), nullptr, &time, &time);  // a wish
}
inline int rename_to_free(const std::filesystem::path& from, const std::filesystem::path& to) {
    return ::MoveFileExW(from.c_str(), to.c_str(), MOVEFILE_WRITE_THROUGH) != 0 ? 0 : fail();
}
inline bool is_disk_full(int error) { return error == ENOSPC || error == EFBIG; }

// ---- Windows: sockets ---------------------------------------------------------------------------

inline void start_socket_library() {
    struct Library {
        Library() {
            WSADATA data;
            ::WSAStartup(MAKEWORD(2, 2), &data);
        }
        ~Library() { ::WSACleanup(); }
    };
    static Library library;
}
inline void prepare_socket(SocketHandle s) {  // there are no signals, and nobody inherits
    u_long on = 1;
    ::ioctlsocket(s, static_cast<long>(FIONBIO), &on);
}
inline void close_socket(SocketHandle s) { ::closesocket(s); }
inline void shut_down_both(SocketHandle s) { ::shutdown(s, SD_BOTH); }
inline void shut_down_writing(SocketHandle s) { ::shutdown(s, SD_SEND); }
inline void keep_system_queue_short(SocketHandle) {}  // cannot be asked for
// Nothing to do. (SO_REUSEADDR means something else here: that others may take the port away.)
inline void allow_quick_restart(SocketHandle) {}

// Only sockets can be polled: one of UDP that talks to itself is both ends.
inline std::array<SocketHandle, 2> make_waker_ends() {
    sockaddr_in loop{};
    loop.sin_family = AF_INET;
    loop.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    auto* address = reinterpret_cast<sockaddr*>(&loop);
    int size = sizeof loop;
    SocketHandle both = ::socket(AF_INET, SOCK_DGRAM, 0);
    if (both == no_socket || ::bind(both, address, size) != 0 ||
        ::getsockname(both, address, &size) != 0 || ::connect(both, address, size) != 0)
        throw_socket_error("Cannot create a socket");
    prepare_socket(both);
    return {both, both};
}

inline std::ptrdiff_t receive_some(SocketHandle s, ByteSpan into) {
    auto size = static_cast<int>(std::min<std::size_t>(into.size(), 1 << 30));
    int got = ::recv(s, reinterpret_cast<char*>(into.data()), size, 0);
    // Shut down from here: elsewhere that is the end of the stream, and no error.
    return got < 0 && ::WSAGetLastError() == WSAESHUTDOWN ? 0 : got;
}
inline std::ptrdiff_t send_some(SocketHandle s, ByteView bytes) {
    auto size = static_cast<int>(std::min<std::size_t>(bytes.size(), 1 << 30));
    return ::send(s, reinterpret_cast<const char*>(bytes.data()), size, 0);
}
// WSAPoll() tells what the other side does, and not that a thread of ours has shut a socket down.
// Reading tells (and MSG_PEEK takes nothing away): so that is what who waits looks at each second.
inline int shut_down_here(std::span<PollEntry> entries) {
    int found = 0;
    for (PollEntry& entry : entries) {
        char byte = 0;
        if (::recv(entry.fd, &byte, 1, MSG_PEEK) >= 0 || ::WSAGetLastError() != WSAESHUTDOWN)
            continue;
        entry.revents = POLLHUP;
        ++found;
    }
    return found;
}
inline int poll_sockets(std::span<PollEntry> entries, int timeout_ms) {
    constexpr int second = 1000;
    for (;; timeout_ms -= timeout_ms < 0 ? 0 : second) {
        int now = timeout_ms < 0 ? second : std::min(timeout_ms, second);
        int events = ::WSAPoll(entries.data(), static_cast<ULONG>(entries.size()), now);
        if (events == 0) events = shut_down_here(entries);
        if (events != 0 || now == timeout_ms) return events;
    }
}

inline int socket_error() { return ::WSAGetLastError(); }
inline bool would_block(int e) { return e == WSAEWOULDBLOCK || e == WSAETIMEDOUT; }
inline bool in_progress(int e) { return e == WSAEWOULDBLOCK; }
inline bool interrupted(int e) { return e == WSAEINTR; }
inline bool out_of_descriptors(int e) { return e == WSAEMFILE || e == WSAENOBUFS; }
inline bool address_in_use(int e) { return e == WSAEADDRINUSE || e == WSAEACCES; }
inline bool not_our_address(int e) { return e == WSAEADDRNOTAVAIL || e == WSAEAFNOSUPPORT; }
inline std::string socket_reason(int e) { return std::system_category().message(e); }
inline std::string lookup_reason(int failure) { return socket_reason(failure); }

// ---- Windows: programs --------------------------------------------------------------------------

inline std::string to_utf8(std::wstring_view wide) {
    auto size = static_cast<int>(wide.size());
    int needed = ::WideCharToMultiByte(CP_UTF8, 0, wide.data(), size, nullptr, 0, nullptr, nullptr);
    std::string text(static_cast<std::size_t>(needed), '\0');
    ::WideCharToMultiByte(CP_UTF8, 0, wide.data(), size, text.data(), needed, nullptr, nullptr);
    return text;
}
inline std::wstring to_utf16(std::string_view text) {
    auto size = static_cast<int>(text.size());
    int needed = ::MultiByteToWideChar(CP_UTF8, 0, text.data(), size, nullptr, 0);
    std::wstring wide(static_cast<std::size_t>(needed), L'\0');
    ::MultiByteToWideChar(CP_UTF8, 0, text.data(), size, wide.data(), needed);
    return wide;
}
inline std::optional<SecretBytes> take_from_environment(const char* name) {
    std::wstring wide_name(name, name + std::strlen(name));
    wchar_t* value = ::_wgetenv(wide_name.c_str());
    if (value == nullptr) return std::nullopt;
    std::string text = to_utf8(value);
    SecretBytes secret = to_secret(text);
    OPENSSL_cleanse(text.data(), text.size());
    OPENSSL_cleanse(value, std::wcslen(value) * sizeof *value);
    ::_wputenv_s(wide_name.c_str(), L"");
    return secret;
}
inline int columns_of(char32_t point) { return point < 0x20 ? 0 : 1; }

// Reads letters from the console, as the console is set. UTF-16 comes in units; what is half of a
// letter stays in `units`. False: there is no console, or no more.
inline bool read_letters(std::wstring& units, std::string& text) {
    std::array<wchar_t, 1024> block;
    DWORD got = 0;
    do {
        ::SetLastError(0);
        if (::ReadConsoleW(::GetStdHandle(STD_INPUT_HANDLE), block.data(), block.size(), &got,
                           nullptr) == 0)
            return false;
    } while (got == 0 && ::GetLastError() == ERROR_OPERATION_ABORTED);  // Ctrl-C: no end
    units.append(block.data(), got);
    bool half = !units.empty() && (units.back() & 0xfc00) == 0xd800;
    text = to_utf8(std::wstring_view(units).substr(0, units.size() - (half ? 1 : 0)));
    units.erase(0, units.size() - (half ? 1 : 0));
    return got > 0;
}

inline void read_keys(std::string_view prompt, const std::function<bool(int key)>& handle) {
    HANDLE console = ::GetStdHandle(STD_INPUT_HANDLE);
    DWORD before = 0;
    if (::GetConsoleMode(console, &before) == 0) throw Error(no_terminal);
    ::SetConsoleMode(console, 0);  // no echo, no lines, no signals
    AtExit restore([&] { ::SetConsoleMode(console, before); });
    std::cerr << prompt << std::flush;
    std::wstring units;
    std::string keys;
    for (bool more = true; more;) {
        AtExit wipe([&] { OPENSSL_cleanse(keys.data(), keys.size()); });
        if (!read_letters(units, keys)) keys = "\x04";  // the end of the input counts as Ctrl-D
        for (std::size_t i = 0; i < keys.size() && more; ++i)
            more = handle(static_cast<unsigned char>(keys[i]));
    }
    std::cerr << '\n';
}

// What a stream writes, if that goes to a console: kept until the stream is flushed.
class ConsoleOutput : public std::streambuf {
  public:
    ConsoleOutput(std::ostream& stream, DWORD which)
        : stream_(stream), before_(stream.rdbuf()), console_(::GetStdHandle(which)) {
        DWORD mode = 0;
        if (::GetConsoleMode(console_, &mode) != 0) stream_.rdbuf(this);
    }
    ConsoleOutput(const ConsoleOutput&) = delete;
    ConsoleOutput& operator=(const ConsoleOutput&) = delete;
    ~ConsoleOutput() override {
        sync();
        stream_.rdbuf(before_);
    }

  private:
    int_type overflow(int_type c) override {
        char byte = traits_type::to_char_type(c);
        xsputn(&byte, 1);
        return c;
    }
    std::streamsize xsputn(const char* text, std::streamsize size) override {
        std::lock_guard lock(mutex_);
        text_.append(text, static_cast<std::size_t>(size));
        return size;
    }
    int sync() override {
        std::lock_guard lock(mutex_);
        std::wstring wide = to_utf16(std::exchange(text_, {}));
        DWORD size = 0;
        ::WriteConsoleW(console_, wide.data(), static_cast<DWORD>(wide.size()), &size, nullptr);
        return 0;
    }

    std::ostream& stream_;
    std::streambuf* before_;
    HANDLE console_;
    std::mutex mutex_;  // guards `text_`: several threads write to the server's log
    std::string text_;
};

// Neither a console nor a pipe can be waited for together with sockets. A thread reads standard
// input, a block when it is asked for one, and wakes who waits for it.
class InputThread {
  public:
    InputThread() : thread_([this] { run(); }) {}
    InputThread(const InputThread&) = delete;
    InputThread& operator=(const InputThread&) = delete;
    ~InputThread() {  // joins; what it is reading is called off
        std::unique_lock lock(mutex_);
        ending_ = true;
        changed_.notify_all();
        while (!changed_.wait_for(lock, std::chrono::milliseconds(10), [&] { return done_; }))
            ::CancelSynchronousIo(handle_);
        lock.unlock();
        thread_.join();
        if (handle_ != nullptr) ::CloseHandle(handle_);
    }

    // Whether there is something to take(), the end being something too.
    bool wait(Waker& waker, int timeout_ms) {
        {
            std::lock_guard lock(mutex_);
            if (ready_) return true;
            wanted_ = true;
            waker_ = &waker;
            changed_.notify_all();
        }
        std::array<PollEntry, 1> entries{{{waker.handle(), POLLIN, 0}}};
        poll_sockets(entries, timeout_ms);
        std::lock_guard lock(mutex_);
        waker_ = nullptr;
        return ready_;
    }
    std::ptrdiff_t take(ByteSpan into) {
        std::unique_lock lock(mutex_);
        wanted_ = wanted_ || !ready_;
        changed_.notify_all();
        changed_.wait(lock, [&] { return ready_; });
        std::size_t size = std::min(into.size(), block_.size());
        std::copy_n(block_.begin(), size, into.begin());
        block_.erase(0, size);
        ready_ = ended_ || !block_.empty();
        return static_cast<std::ptrdiff_t>(size);
    }

  private:
    void run() {
        ::DuplicateHandle(::GetCurrentProcess(), ::GetCurrentThread(), ::GetCurrentProcess(),
                          &handle_, 0, FALSE, DUPLICATE_SAME_ACCESS);
        bool console = is_terminal(0);
        ::_setmode(0, _O_BINARY);  // a byte 0x1a in a file is not its end
        std::wstring units;
        std::string block;
        std::unique_lock lock(mutex_);
        for (;;) {
            changed_.wait(lock, [&] { return wanted_ || ending_; });
            if (ending_) break;
            lock.unlock();
            if (console) {
                if (!read_letters(units, block) || block.starts_with('\x1a')) block.clear();
            } else {
                block.resize(65536);
                std::ptrdiff_t got = ::_read(0, block.data(), static_cast<unsigned>(block.size()));
                block.resize(static_cast<std::size_t>(std::max<std::ptrdiff_t>(got, 0)));
            }
            lock.lock();
            block_ += block;
            wanted_ = false;
            ended_ = block.empty();
            ready_ = true;
            if (waker_ != nullptr) waker_->wake();
            changed_.notify_all();
        }
        done_ = true;
        changed_.notify_all();
    }

    std::mutex mutex_;  // guards everything below, but `handle_`: set before the first block
    std::condition_variable changed_;
    std::string block_;  // what was read and not yet taken
    bool wanted_ = false, ready_ = false, ended_ = false, ending_ = false, done_ = false;
    Waker* waker_ = nullptr;  // of who waits
    HANDLE handle_ = nullptr;
    std::thread thread_;
};
inline InputThread& input_thread() {
    static InputThread thread;
    return thread;
}
inline std::ptrdiff_t read_input(ByteSpan into) { return input_thread().take(into); }

}  // namespace detail

inline std::size_t raise_descriptor_limit() { return 16384; }
inline void share_one_heap() {}

inline void make_write_errors_errors() {}
// What is written to a console is UTF-16; the C library would take our UTF-8 for something else.
inline void open_standard_descriptors() {
    static detail::ConsoleOutput out(std::cout, STD_OUTPUT_HANDLE);
    static detail::ConsoleOutput err(std::cerr, STD_ERROR_HANDLE);
}
inline char** arguments_in_utf8(int, char** argv) {
    static std::vector<std::string> texts;
    static std::vector<char*> pointers;
    int count = 0;
    wchar_t** wide = ::CommandLineToArgvW(::GetCommandLineW(), &count);
    if (wide == nullptr) return argv;
    for (int i = 0; i < count; ++i) texts.push_back(detail::to_utf8(wide[i]));
    ::LocalFree(wide);
    for (std::string& text : texts) pointers.push_back(text.data());
    pointers.push_back(nullptr);
    return pointers.data();
}
inline void when_asked_to_end(void (*handler)(int signal)) {
    static std::atomic<void (*)(int)> called = nullptr;
    struct Console {
        static BOOL WINAPI handle(DWORD event) {
            called.load()(event == CTRL_C_EVENT ? SIGINT : SIGTERM);
            if (event >= CTRL_CLOSE_EVENT) ::Sleep(INFINITE);  // what returns is ended at once
            return TRUE;
        }
    };
    called = handler;
    ::SetConsoleCtrlHandler(&Console::handle, TRUE);
}
inline bool is_terminal(int descriptor) {
    DWORD mode = 0;
    return ::GetConsoleMode(detail::handle_of(descriptor), &mode) != 0;
}
inline TerminalSize terminal_size() {
    CONSOLE_SCREEN_BUFFER_INFO info{};
    if (::GetConsoleScreenBufferInfo(::GetStdHandle(STD_OUTPUT_HANDLE), &info) == 0) return {};
    return {static_cast<unsigned short>(info.srWindow.Bottom - info.srWindow.Top + 1),
            static_cast<unsigned short>(info.srWindow.Right - info.srWindow.Left + 1)};
}
inline std::tm local_time(std::time_t time) {
    std::tm local{};
    ::localtime_s(&local, &time);
    return local;
}
inline Readiness wait_for_input(Waker& waker, bool want_input, int timeout_ms) {
    Readiness ready;
    if (want_input) {
        ready.input = detail::input_thread().wait(waker, timeout_ms);
    } else {
        std::array<detail::PollEntry, 1> entries{{{waker.handle(), POLLIN, 0}}};
        detail::poll_sockets(entries, timeout_ms);
    }
    waker.drain();
    return ready;
}
inline std::filesystem::path default_home() {
    const wchar_t* data = ::_wgetenv(L"APPDATA");
    return data != nullptr ? std::filesystem::path(data) / "ChatSecure" : std::filesystem::path();
}
inline std::filesystem::path default_downloads() {
    const wchar_t* profile = ::_wgetenv(L"USERPROFILE");
    std::filesystem::path folder =
        std::filesystem::path(profile != nullptr ? profile : L"") / "Downloads";
    std::error_code failure;  // then there is none
    return std::filesystem::is_directory(folder, failure) ? folder : "downloads";
}

#else

namespace detail {

// ---- POSIX: files -------------------------------------------------------------------------------

// Otherwise what belongs behind the first 4 GiB of a file would be written over its beginning.
static_assert(sizeof(off_t) >= 8, "On this system, compile with -D_FILE_OFFSET_BITS=64.");

inline int open_file(const std::filesystem::path& path, bool create, FileMode mode) {
    int flags = create ? O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW : O_RDONLY;
    return ::open(path.c_str(), flags | O_CLOEXEC, mode == FileMode::owner_only ? 0600 : 0644);
}
inline void give_back_free_memory() {
#ifdef __GLIBC__
    ::malloc_trim(0);
#endif
}
inline int close_file(int file) { return ::close(file); }
inline int sync_file(int file) {
#ifdef F_FULLFSYNC  // macOS, whose fsync() leaves them in the disk's own memory
    if (::fcntl(file, F_FULLFSYNC) == 0) return 0;  // not every file system can do it
#endif
    return ::fsync(file);
}
inline std::ptrdiff_t read_some(int file, ByteSpan into) {
    return ::read(file, into.data(), into.size());
}
inline int rename_over(const std::filesystem::path& from, const std::filesystem::path& to) {
    return ::rename(from.c_str(), to.c_str());
}
inline bool sync_directory(const std::filesystem::path& directory) {
    int handle = ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (handle < 0) return true;  // an unreadable directory: one cannot ask for more
    bool synced =
        sync_file(handle) == 0 || errno == EINVAL;  // or the file system knows no such thing
    int reason = errno;
    ::close(handle);
    errno = reason;
    return synced;
}

inline std::intptr_t lock_directory(const std::filesystem::path& directory, bool wait,
                                    std::string_view busy) {
    int lock = ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (lock < 0)
        throw Error(
            concat("Cannot open the directory ", directory.string(), ": ", system_reason(), "."));
    const auto until = std::chrono::steady_clock::now() + lock_patience;
    for (;;) {  // flock() knows no time limit, so we look now and then
        if (::flock(lock, LOCK_EX | LOCK_NB) == 0) return lock;
        bool held = errno == EWOULDBLOCK || errno == EINTR;
        if (!held || !wait || std::chrono::steady_clock::now() >= until) break;
        ::poll(nullptr, 0, 10);
        errno = EWOULDBLOCK;
    }
    std::string reason =
        errno == EWOULDBLOCK
            ? std::string(busy)
            : concat("Cannot lock the directory ", directory.string(), ": ", system_reason(), ".");
    ::close(lock);
    throw Error(reason);
}
inline void unlock_directory(std::intptr_t lock) { ::close(static_cast<int>(lock)); }
inline bool may_write_into(const std::filesystem::path& directory) {
    return ::access(directory.c_str(), W_OK | X_OK) == 0;
}

// Without waiting: opening a named pipe for reading would wait for somebody who writes into it.
inline int open_to_send(const std::filesystem::path& path) {
    return ::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
}
inline int open_part(const std::filesystem::path& path, bool create) {
    return ::open(path.c_str(),
                  O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC | (create ? O_CREAT | O_EXCL : 0),
                  0666);
}
inline bool attributes_of(int file, FileAttributes& attributes) {
    struct stat raw {};
    if (::fstat(file, &raw) != 0) return false;
#ifdef __APPLE__
    const timespec& modified = raw.st_mtimespec;
#else
    const timespec& modified = raw.st_mtim;
#endif
    attributes = {
        S_ISREG(raw.st_mode), S_ISDIR(raw.st_mode), static_cast<std::uint64_t>(raw.st_size),
        modified.tv_sec <= 0 ? 0
                             : static_cast<std::uint64_t>(modified.tv_sec) * 1'000'000'000 +
                                   static_cast<std::uint64_t>(modified.tv_nsec)};
    return true;
}
inline std::ptrdiff_t read_some_at(int file, ByteSpan into, std::uint64_t offset) {
    return ::pread(file, into.data(), into.size(), static_cast<off_t>(offset));
}
inline std::ptrdiff_t write_some_at(int file, ByteView bytes, std::uint64_t offset) {
    return ::pwrite(file, bytes.data(), bytes.size(), static_cast<off_t>(offset));
}
inline bool truncate_file(int file, std::uint64_t size) {
    return ::ftruncate(file, static_cast<off_t>(size)) == 0;
}
inline bool lock_file(int file) {
    return ::flock(file, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK;
}
inline void set_modified(int file, std::uint64_t nanoseconds) {
    timespec time{};
    time.tv_sec = static_cast<decltype(time.tv_sec)>(nanoseconds / 1'000'000'000);
    time.tv_nsec = static_cast<decltype(time.tv_nsec)>(nanoseconds % 1'000'000'000);
    std::array<timespec, 2> accessed_and_modified{time, time};
    ::futimens(file, accessed_and_modified.data());  // a wish: some file systems cannot
}
// rename() would overwrite what has that name; link() does not, and looks and acts in one step.
inline int rename_to_free(const std::filesystem::path& from, const std::filesystem::path& to) {
    if (::link(from.c_str(), to.c_str()) == 0) {
        if (::unlink(from.c_str()) == 0) return 0;
        int reason = errno;
        ::unlink(to.c_str());  // one file with two names: a new attempt at one would spoil both
        errno = reason;
        return -1;
    }
    if (errno == EEXIST) return -1;
    struct stat there {};  // a file system without links (a memory card): look, then act
    if (::lstat(to.c_str(), &there) == 0) {
        errno = EEXIST;
        return -1;
    }
    return ::rename(from.c_str(), to.c_str());
}
inline bool is_disk_full(int error) { return error == ENOSPC || error == EFBIG || error == EDQUOT; }

// ---- POSIX: sockets -----------------------------------------------------------------------------

inline void start_socket_library() {}
// A program that is started from here shall not inherit our connections, and a write to a closed
// one shall be an error: on macOS one says that here, elsewhere with each send().
inline void prepare_socket(SocketHandle s) {
    ::fcntl(s, F_SETFD, FD_CLOEXEC);
    ::fcntl(s, F_SETFL, ::fcntl(s, F_GETFL, 0) | O_NONBLOCK);
#ifdef SO_NOSIGPIPE
    set_option(s, SOL_SOCKET, SO_NOSIGPIPE, 1);
#endif
}
inline void close_socket(SocketHandle s) { ::close(s); }
inline void shut_down_both(SocketHandle s) { ::shutdown(s, SHUT_RDWR); }
inline void shut_down_writing(SocketHandle s) { ::shutdown(s, SHUT_WR); }
inline void keep_system_queue_short([[maybe_unused]] SocketHandle s) {
#ifdef TCP_NOTSENT_LOWAT
    set_option(s, IPPROTO_TCP, TCP_NOTSENT_LOWAT, 256 * 1024);
#endif
}
// Without it, a restarted server cannot have its port back while old connections linger in
// TIME_WAIT: for a minute or so the side that ended first keeps them in mind, so that a packet that
// comes late is not taken for part of a new connection.
inline void allow_quick_restart(SocketHandle s) { set_option(s, SOL_SOCKET, SO_REUSEADDR, 1); }

inline std::array<SocketHandle, 2> make_waker_ends() {
    std::array<SocketHandle, 2> ends{};
    if (::socketpair(AF_UNIX, SOCK_STREAM, 0, ends.data()) != 0)
        throw_socket_error("Cannot create a pair of sockets");
    for (SocketHandle end : ends) prepare_socket(end);
    return ends;
}

inline std::ptrdiff_t receive_some(SocketHandle s, ByteSpan into) {
    return ::recv(s, into.data(), into.size(), 0);
}
inline std::ptrdiff_t send_some(SocketHandle s, ByteView bytes) {
#ifdef MSG_NOSIGNAL
    return ::send(s, bytes.data(), bytes.size(), MSG_NOSIGNAL);
#else
    return ::send(s, bytes.data(), bytes.size(), 0);
#endif
}
inline int poll_sockets(std::span<PollEntry> entries, int timeout_ms) {
    return ::poll(entries.data(), static_cast<nfds_t>(entries.size()), timeout_ms);
}

inline int socket_error() { return errno; }
inline bool would_block(int e) { return e == EAGAIN || e == EWOULDBLOCK; }
inline bool in_progress(int e) { return e == EINPROGRESS || e == EINTR; }
inline bool interrupted(int e) { return e == EINTR; }
inline bool out_of_descriptors(int e) {
    return e == EMFILE || e == ENFILE || e == ENOBUFS || e == ENOMEM;
}
inline bool address_in_use(int e) { return e == EADDRINUSE; }
inline bool not_our_address(int e) { return e == EADDRNOTAVAIL || e == EAFNOSUPPORT; }
inline std::string socket_reason(int e) { return system_reason(e); }
inline std::string lookup_reason(int failure) { return ::gai_strerror(failure); }

// ---- POSIX: programs ----------------------------------------------------------------------------

inline std::optional<SecretBytes> take_from_environment(const char* name) {
    char* value = std::getenv(name);
    if (value == nullptr) return std::nullopt;
    SecretBytes secret = to_secret(value);
    OPENSSL_cleanse(value, secret.size());
    ::unsetenv(name);
    return secret;
}
inline std::ptrdiff_t read_input(ByteSpan into) { return read_some(STDIN_FILENO, into); }
inline int columns_of(char32_t point) { return ::wcwidth(static_cast<wchar_t>(point)); }

// The terminal is in raw mode meanwhile, so that an interrupt cannot leave it mute.
inline void read_keys(std::string_view prompt, const std::function<bool(int key)>& handle) {
    termios before{};
    if (::tcgetattr(STDIN_FILENO, &before) != 0) throw Error(no_terminal);
    termios raw = before;
    raw.c_lflag &= ~static_cast<tcflag_t>(ECHO | ICANON | ISIG);
    auto begin = [&] {
        ::tcsetattr(STDIN_FILENO, TCSAFLUSH, &raw);
        std::cerr << prompt << std::flush;
    };
    begin();
    AtExit restore([&] { ::tcsetattr(STDIN_FILENO, TCSAFLUSH, &before); });
    constexpr unsigned char ctrl_z = 0x1a;
    unsigned char key = 0;
    do {
        key = 4;  // the end of the input counts as Ctrl-D
        while (::read(STDIN_FILENO, &key, 1) < 0 && errno == EINTR) {
        }
        if (key == ctrl_z) {  // stop, and go on where we were
            std::cerr << '\n';
            ::tcsetattr(STDIN_FILENO, TCSAFLUSH, &before);
            std::raise(SIGTSTP);
            begin();
        }
    } while (key == ctrl_z || handle(key));
    std::cerr << '\n';
}

}  // namespace detail

inline std::size_t raise_descriptor_limit() {
    rlimit limit{};
    ::getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
#ifdef __APPLE__
    limit.rlim_cur = std::min<rlim_t>(limit.rlim_max, OPEN_MAX);  // more is refused
#endif
    ::setrlimit(RLIMIT_NOFILE, &limit);
    ::getrlimit(RLIMIT_NOFILE, &limit);
    return static_cast<std::size_t>(limit.rlim_cur);
}
inline void share_one_heap() {
#ifdef __GLIBC__
    ::mallopt(M_ARENA_MAX, 1);
#endif
}

inline void make_write_errors_errors() {
    std::signal(SIGPIPE, SIG_IGN);
    std::signal(SIGXFSZ, SIG_IGN);
}
inline void open_standard_descriptors() {
    int lowest = ::open("/dev/null", O_RDWR);
    while (lowest >= 0 && lowest <= STDERR_FILENO) lowest = ::dup(lowest);
    ::close(lowest);
}
inline char** arguments_in_utf8(int, char** argv) { return argv; }
inline void when_asked_to_end(void (*handler)(int signal)) {
    struct sigaction action {};  // without SA_RESTART: a write that blocks must end, too
    action.sa_handler = handler;
    for (int signal : {SIGINT, SIGTERM, SIGHUP}) ::sigaction(signal, &action, nullptr);
}
inline bool is_terminal(int descriptor) { return ::isatty(descriptor) == 1; }
inline TerminalSize terminal_size() {
    winsize size{};
    if (::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return {};
    return {size.ws_row, size.ws_col};
}
inline std::tm local_time(std::time_t time) {
    std::tm local{};
    ::localtime_r(&time, &local);
    return local;
}
inline Readiness wait_for_input(Waker& waker, bool want_input, int timeout_ms) {
    std::array<pollfd, 3> entries{{{waker.handle(), POLLIN, 0},
                                   {want_input ? STDIN_FILENO : -1, POLLIN, 0},
                                   {STDOUT_FILENO, 0, 0}}};
    int events = ::poll(entries.data(), entries.size(), timeout_ms);
    if (events > 0 && (entries[2].revents & POLLNVAL) != 0) {  // macOS cannot watch /dev/null
        entries[2].fd = -1;
        events = ::poll(entries.data(), entries.size(), timeout_ms);
    }
    if (events <= 0) return {};
    if (entries[0].revents != 0) waker.drain();
    return {entries[1].revents != 0, (entries[2].revents & (POLLERR | POLLHUP)) != 0};
}
inline std::filesystem::path default_home() {
    auto variable = [](const char* name) {
        const char* value = std::getenv(name);
        return std::filesystem::path(value != nullptr ? value : "");
    };
    std::filesystem::path home = variable("HOME");
    if (!home.is_absolute()) {  // a service: whose account is it?
        std::array<char, 16'384> buffer;
        passwd entry{}, *found = nullptr;
        if (::getpwuid_r(::geteuid(), &entry, buffer.data(), buffer.size(), &found) == 0 &&
            found != nullptr)
            home = entry.pw_dir;
    }
#ifdef __APPLE__
    std::filesystem::path data = home / "Library" / "Application Support" / "ChatSecure";
#else
    std::filesystem::path data = variable("XDG_DATA_HOME");
    if (data.is_absolute()) return data / "chatsecure";
    data = home / ".local" / "share" / "chatsecure";
#endif
    return home.is_absolute() ? data : std::filesystem::path();
}
inline std::filesystem::path default_downloads() {
    const char *set = std::getenv("XDG_DOWNLOAD_DIR"), *home_is = std::getenv("HOME");
    if (set != nullptr && *set != '\0') return set;
    if (home_is == nullptr) return "downloads";
    std::filesystem::path home = home_is;
    std::string content;
    try {
        if (auto bytes = read_file(home / ".config" / "user-dirs.dirs", 1U << 20))
            content = to_string(*bytes);
    } catch (const Error&) {  // as if there were none
    }
    std::istringstream in(content);
    const std::string name = "XDG_DOWNLOAD_DIR=\"$HOME/";  // and then: Downloads"
    for (std::string line; std::getline(in, line);)
        if (line.starts_with(name) && line.size() > name.size() + 1 && line.ends_with('"'))
            return home / line.substr(name.size(), line.size() - name.size() - 1);
    std::error_code failure;  // then there is none
    bool is_there = std::filesystem::is_directory(home / "Downloads", failure);
    return is_there ? home / "Downloads" : "downloads";
}

#endif

}  // namespace chatsecure

// ---- Try it -------------------------------------------------------------------------------------
//
// Break: open-to-others (files with secrets can be read by everybody on the machine) and
// overwritten (a received file takes the place of another one).
//
// Write poll_sockets() for a system that has SELECT() and no poll(), in namespace detail. It
// behaves alike for POLLIN and POLLOUT, for a time limit of -1, 0 or more, and for a socket that is
// closed at the other end. Which sockets have no place in an fd_set? Refuse those (a negative
// number, with errno set to EINVAL).
//
//      int poll_with_select(std::span<PollEntry> entries, int timeout_ms)
//
// Green: exercise: select

#endif  // CHATSECURE_HPP

// MIT License
//
// Copyright (c) 2026 The ChatSecure authors
//
// Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
// associated documentation files (the "Software"), to deal in the Software without restriction,
// including without limitation the rights to use, copy, modify, merge, publish, distribute,
// sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
// furnished to do so, subject to the following conditions:
//
// The above copyright notice and this permission notice shall be included in all copies or
// substantial portions of the Software.
//
// THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
// NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
// NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
// DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
// OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
