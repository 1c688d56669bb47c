// The tests of ChatSecure, in the order of the chapters: first the pieces, then server and client
// in one process, then the attacks on the properties P1 to P12 of the design, then the real
// programs as a user runs them.
//
//      ./tests                 runs all (./tests --help: doctest's flags, to choose some)
//
// Nothing here waits by sleeping, and no port is fixed. Keys are small (2048 bits) and passwords
// are hashed a few times only: what is tested is that they are used, not that they are slow.

#include "chatsecure.hpp"

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <random>
#include <typeinfo>

#include <openssl/param_build.h>
#include <spawn.h>
#include <sys/ioctl.h>
#include <sys/wait.h>

using namespace chatsecure;

namespace {

// ---- Tools --------------------------------------------------------------------------------------

constexpr std::uint32_t few_iterations = min_iterations;
constexpr Milliseconds long_enough{20'000};  // for whatever must happen: only failures wait for it

// A fresh private directory, removed with everything in it.
struct TempDir {
    std::filesystem::path path;
    TempDir() {
        std::string name = (std::filesystem::temp_directory_path() / "chatsecure-XXXXXX").string();
        if (::mkdtemp(name.data()) == nullptr) throw Error("Cannot make a temporary directory.");
        path = name;
    }
    TempDir(const TempDir&) = delete;
    TempDir& operator=(const TempDir&) = delete;
    ~TempDir() {
        std::error_code ignored;
        std::filesystem::remove_all(path, ignored);
    }
};

// RSA keys are expensive to make: three serve all tests. n = 0, 1, 2.
const RsaPrivateKey& test_key(int n) {
    static const std::array<RsaPrivateKey, 3> keys{RsaPrivateKey::generate(2048),
                                                   RsaPrivateKey::generate(2048),
                                                   RsaPrivateKey::generate(2048)};
    return keys.at(static_cast<std::size_t>(n));
}

// What a command prints. Throws if it fails.
std::string shell(const std::string& command) {
    FILE* pipe = ::popen(command.c_str(), "r");
    if (pipe == nullptr) throw Error("popen failed.");
    std::string output;
    for (int c; (c = std::fgetc(pipe)) != EOF;) output += static_cast<char>(c);
    if (::pclose(pipe) != 0) throw Error("This command failed: " + command);
    return output;
}

// Two ends of one TCP connection over loopback.
std::pair<Socket, Socket> socket_pair() {
    Listener listener("127.0.0.1", 0);
    Waker never;
    Socket first = connect_to("127.0.0.1", listener.port(), Milliseconds(5000), never);
    return {std::move(first), std::move(listener.accept(never)->socket)};
}

}  // namespace

// =================================================================================================
//  Chapters 1 to 8: every part of the header by itself
// =================================================================================================

namespace {

// The sentence of the error that a function throws; empty if it throws none. What is no Error
// passes through, and fails the test.
template <class F>
std::string complaint(F function) {
    try {
        function();
    } catch (const Error& e) {
        return e.what();
    }
    return "";
}
// The same, and it must be exactly this kind of error.
template <class Kind, class F>
bool throws(F function) {
    try {
        function();
    } catch (const Kind& e) {
        return typeid(e) == typeid(Kind);
    }
    return false;
}

bool contains(std::string_view text, std::string_view part) { return text.find(part) != text.npos; }

void write_text(const std::filesystem::path& path, std::string_view text) {
    std::ofstream(path, std::ios::binary) << text;
}
std::string read_text(const std::filesystem::path& path) {
    std::ifstream in(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(in), {});
}
std::filesystem::perms mode_of(const std::filesystem::path& path) {
    return std::filesystem::status(path).permissions() & std::filesystem::perms::mask;
}
constexpr auto owner_read_write =
    std::filesystem::perms::owner_read | std::filesystem::perms::owner_write;

Secret<32> secret_of(std::uint8_t fill) { return Secret<32>(Bytes(32, fill)); }
std::string hex_of(const Secret<32>& secret) { return to_hex(secret.view()); }
Bytes bytes_of(std::string_view text) { return to_bytes(as_bytes(text)); }

}  // namespace

// ---- Chapter 1. Bytes ---------------------------------------------------------------------------

namespace {

enum class Colour : std::uint16_t { blue = 0x0b1e };

struct Sample {  // a field of every kind
    std::uint8_t one = 0;
    std::uint16_t two = 0;
    std::uint32_t four = 0;
    std::uint64_t eight = 0;
    Colour colour{};
    std::string text;
    Bytes blob;
    std::array<std::uint8_t, 3> fixed{};
    static void fields(auto& self, auto& io) {
        io(self.one, self.two, self.four, self.eight, self.colour, self.text, self.blob,
           self.fixed);
    }
};

const Sample sample{0x01,         0x0203, 0x04050607, 0x08090a0b0c0d0e0f,
                    Colour::blue, "hi\n", {0xff, 0},  {7, 8, 9}};

constexpr std::string_view sample_hex =
    "01"
    "0203"
    "04050607"
    "08090a0b0c0d0e0f"
    "0b1e"
    "000368690a"
    "00000002ff00"
    "070809";

}  // namespace

TEST_CASE("chapter 1: numbers are big-endian, texts and blobs come behind their length") {
    CHECK(to_hex(encode(sample)) == sample_hex);
}

TEST_CASE("chapter 1: every kind of field comes back as it was written") {
    Sample back = decode<Sample>(encode(sample), "a sample");
    CHECK(back.one == sample.one);
    CHECK(back.two == sample.two);
    CHECK(back.four == sample.four);
    CHECK(back.eight == sample.eight);
    CHECK(back.colour == sample.colour);
    CHECK(back.text == sample.text);
    CHECK(back.blob == sample.blob);
    CHECK(back.fixed == sample.fixed);
}

TEST_CASE("chapter 1: a reader refuses what is cut short, at every length") {
    Bytes whole = encode(sample);
    for (std::size_t size = 0; size < whole.size(); ++size) {
        CAPTURE(size);
        Bytes cut(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size));
        CHECK_THROWS_WITH_AS(decode<Sample>(cut, "a sample"),
                             "Received a sample that is cut short.", ProtocolError);
    }
}

TEST_CASE("chapter 1: a reader refuses bytes behind the end") {
    Bytes longer = encode(sample);
    longer.push_back(0);
    CHECK_THROWS_WITH_AS(decode<Sample>(longer, "a sample"),
                         "Received a sample with 1 bytes too many.", ProtocolError);
}

TEST_CASE("chapter 1: a length is a claim: 4 GiB that are not there are not allocated") {
    Bytes claim = from_hex("ffffffff");
    Bytes blob;
    CHECK_THROWS_AS(Reader(claim, "a blob")(blob), ProtocolError);
    CHECK(blob.capacity() == 0);
}

TEST_CASE("chapter 1: a text field holds 65535 bytes and not one more") {
    Bytes out;
    append_fields(out, std::string(65535, 'x'));
    CHECK(out.size() == 2 + 65535);
    CHECK_THROWS_AS(append_fields(out, std::string(65536, 'x')), Error);
}

TEST_CASE("chapter 1: hexadecimal there and back") {
    Bytes bytes{0x00, 0x01, 0x7f, 0x80, 0xff};
    CHECK(to_hex(bytes) == "00017f80ff");
    CHECK(from_hex("00017f80ff") == bytes);
    CHECK(from_hex("00017F80FF") == bytes);
    CHECK(from_hex("") == Bytes{});
    for (std::string_view bad : {"0", "0g", "g0", "0x", " 1", "+1", "-1", "1 ", "00 1"}) {
        CAPTURE(bad);
        CHECK(throws<Error>([&] { from_hex(bad); }));
    }
}

TEST_CASE("chapter 1: base64, the vectors of RFC 4648 section 10") {
    const std::pair<std::string_view, std::string_view> vectors[]{{"", ""},
                                                                  {"f", "Zg=="},
                                                                  {"fo", "Zm8="},
                                                                  {"foo", "Zm9v"},
                                                                  {"foob", "Zm9vYg=="},
                                                                  {"fooba", "Zm9vYmE="},
                                                                  {"foobar", "Zm9vYmFy"}};
    for (auto [plain, text] : vectors) {
        CHECK(to_base64(as_bytes(plain)) == text);
        CHECK(as_text(from_base64(text)) == plain);
    }
}

TEST_CASE("chapter 1: base64 of every length and byte comes back") {
    Bytes bytes;
    for (unsigned i = 0; i <= 256; ++i) {
        CHECK(from_base64(to_base64(bytes)) == bytes);
        bytes.push_back(static_cast<std::uint8_t>(i * 37));
    }
}

TEST_CASE("chapter 1: base64 is strict: a value has one text") {
    using namespace std::string_view_literals;
    const std::string_view bad_texts[]{
        "Zg",    "Zg=",   "Z",      "Zm8",      "Zm9vY",                   // padding missing
        "Zg===", "Zm9v=", "Zm9v==", "Zm9v====", "=",        "==",          // too much of it
        "====",  "Z===",  "=Zg=",   "Zg=v",     "Zg==Zg==",                // in a wrong place
        "Zh==",  "Zm9=",  "Zn==",                                          // unused bits set
        " Zm9v", "Zm9v ", "Zm9v\n", "Zm\n9v",   "Zm 9",     "    ", "\n",  // white space
        "Zm9-",  "Zm9_",  "Zm9*",   "Zm9\xff",  "Zm9\0"sv,                 // no digits
    };
    for (std::string_view bad : bad_texts) {
        CAPTURE(bad);
        CHECK(throws<Error>([&] { from_base64(bad); }));
    }
}

TEST_CASE("chapter 1: comparing in constant time compares") {
    Bytes a{1, 2, 3}, other_end{1, 2, 4}, shorter{1, 2};
    CHECK(equal_in_constant_time(a, Bytes{1, 2, 3}));
    CHECK_FALSE(equal_in_constant_time(a, other_end));
    CHECK_FALSE(equal_in_constant_time(a, shorter));
    CHECK(equal_in_constant_time({}, {}));
}

TEST_CASE("chapter 1: a secret that moves leaves nothing behind") {
    const Bytes zeros(32, 0), sevens(32, 7);
    Secret<32> first = secret_of(7);
    Secret<32> second = std::move(first);
    CHECK(to_bytes(first.view()) == zeros);
    CHECK(to_bytes(second.view()) == sevens);
    Secret<32> third;
    third = std::move(second);
    CHECK(to_bytes(second.view()) == zeros);
    CHECK(to_bytes(third.view()) == sevens);
    static_assert(!std::is_copy_constructible_v<Secret<32>>);
    static_assert(!std::is_copy_assignable_v<Secret<32>>);
}

TEST_CASE("chapter 1: a secret is wiped when it ends") {
    alignas(Secret<32>) std::array<std::uint8_t, sizeof(Secret<32>)> memory;
    auto* secret = new (memory.data()) Secret<32>(Bytes(32, 7));
    CHECK(memory[31] == 7);
    secret->~Secret();
    CHECK(memory == std::array<std::uint8_t, sizeof(Secret<32>)>{});
}

TEST_CASE("chapter 1: a secret has its size") {
    CHECK_THROWS_AS(Secret<32>(Bytes(31)), Error);
    CHECK_THROWS_AS(Secret<32>(Bytes(33)), Error);
}

TEST_CASE("chapter 1: valid UTF-8 is counted, the first and last of each length") {
    const std::pair<std::string_view, std::size_t> valid[]{
        {"", 0},
        {"A", 1},
        {"\x7f", 1},
        {"\xc2\x80", 1},
        {"\xdf\xbf", 1},
        {"\xe0\xa0\x80", 1},
        {"\xed\x9f\xbf", 1},
        {"\xee\x80\x80", 1},  // around the surrogates
        {"\xef\xbf\xbf", 1},
        {"\xf0\x90\x80\x80", 1},
        {"\xf4\x8f\xbf\xbf", 1},  // U+10FFFF
        {"Gr\xc3\xbc\xc3\x9f"
         "e",
         5},
    };
    for (const auto& vector : valid) {
        CAPTURE(to_hex(as_bytes(vector.first)));
        CHECK(utf8_length(vector.first) == vector.second);
    }
}

TEST_CASE("chapter 1: invalid UTF-8 is refused") {
    const std::string_view invalid[]{
        "\x80",
        "\xbf",
        "\xfe",
        "\xff",  // begin nothing
        "\xc0\x80",
        "\xc1\xbf",
        "\xe0\x80\x80",
        "\xe0\x9f\xbf",  // overlong
        "\xf0\x80\x80\x80",
        "\xf0\x8f\xbf\xbf",
        "\xed\xa0\x80",
        "\xed\xbf\xbf",  // surrogates
        "\xf4\x90\x80\x80",
        "\xf5\x80\x80\x80",
        "\xf8\x88\x80\x80\x80",  // above U+10FFFF
        "\xc2",
        "\xe2\x82",
        "\xf0\x9f\x92",  // cut short
        "\xc2"
        "A",
        "\xe2\x82"
        "A",
        "\xf0\x9f\x92"
        "A",  // not continued
        "ok\xff",
        "\xc3\xa9\xa9",
    };
    for (std::string_view text : invalid) {
        CAPTURE(to_hex(as_bytes(text)));
        CHECK(utf8_length(text) == std::nullopt);
    }
}

TEST_CASE("chapter 1: an invalid byte is taken alone, and reading goes on behind it") {
    std::string_view text =
        "\xe2\x82"
        "A";
    CHECK(take_code_point(text) == invalid_code_point);
    CHECK(take_code_point(text) == invalid_code_point);
    CHECK(take_code_point(text) == U'A');
    CHECK(text.empty());
}

TEST_CASE("chapter 1: what could drive a terminal becomes visible") {
    using namespace std::string_view_literals;
    const std::pair<std::string_view, std::string_view> cases[]{
        {"\x1b[2J", "\\x1b[2J"},                     // ESC: clear the screen
        {"\x1b]0;title\x07", "\\x1b]0;title\\x07"},  // rename the window
        {"two\nlines", "two\\nlines"},               // a line that somebody else "said"
        {"\rover", "\\x0dover"},                     // back to the begin of the line
        {"a\tb", "a    b"},
        {"a\0b"sv, "a\\x00b"},
        {"\x7f", "\\x7f"},
        {"\xc2\x80", "\\u0080"},
        {"\xc2\x9b"
         "2J",
         "\\u009b2J"},
        {"\xc2\x9f", "\\u009f"},  // C1
        {"\x9b"
         "2J",
         "\\x9b2J"},                                // CSI as a bare byte is no UTF-8
        {"\xe2\x80\xaetxt.exe", "\\u202etxt.exe"},  // right-to-left override
        {"\xe2\x80\xaa", "\\u202a"},
        {"\xe2\x81\xa6", "\\u2066"},
        {"\xe2\x81\xa9", "\\u2069"},
        {"\xe2\x80\xa8", "\\u2028"},
        {"\xe2\x80\xa9", "\\u2029"},
        {"\xff\xfe", "\\xff\\xfe"},
    };
    for (auto [text, shown] : cases) CHECK(visible(text) == shown);
}

TEST_CASE("chapter 1: what only draws stays as it is") {
    for (std::string_view text :
         {"", "plain text, with punctuation: \\ ' \" %",
          "Gr\xc3\xbc\xc3\x9f"
          "e",
          "\xe6\x97\xa5\xe6\x9c\xac\xe8\xaa\x9e",          // Japanese
          "\xd7\xa9\xd7\x9c\xd7\x95\xd7\x9d",              // Hebrew
          "\xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f\x92\xbb",  // an emoji joined by ZWJ
          "\xc2\xa0"})                                     // the first behind C1
        CHECK(visible(text) == text);
}

TEST_CASE("chapter 1: no two bytes make visible() let anything through") {
    for (unsigned pair = 0; pair <= 0xffff; ++pair) {
        std::string text{static_cast<char>(pair >> 8), static_cast<char>(pair & 0xff)};
        std::string shown = visible(text);
        bool safe = true;
        for (std::string_view left = shown; !left.empty();) {
            char32_t point = take_code_point(left);
            safe = safe && point != invalid_code_point && !drives_the_screen(point);
        }
        if (!safe) FAIL("visible() lets pass ", to_hex(as_bytes(text)));
    }
}

TEST_CASE("chapter 1: user names are few characters, in lower case") {
    for (std::string_view good : {"a", "0", "alice", "bob-2", "x_y.z", "7of9", "a..", "a-_."})
        CHECK(is_valid_name(good));
    CHECK(is_valid_name(std::string(32, 'a')));
    CHECK_FALSE(is_valid_name(std::string(33, 'a')));
    CHECK_FALSE(is_valid_name(std::string_view("a\0", 2)));
    for (std::string_view bad :
         {"", "Alice", ".hidden", "-flag", "_x", "a b", "a/b", "..", "a\n", "#a", "a:b",
          "al\xc3\xad"
          "ce",
          "\xd0\xb0lice", "a$"}) {
        CAPTURE(bad);
        CHECK_FALSE(is_valid_name(bad));
    }
}

TEST_CASE("chapter 1: names are folded to lower case before anything is done with them") {
    CHECK(fold_name("Alice") == "alice");
    CHECK(fold_name("BOB-2") == "bob-2");
    CHECK(throws<Error>([] { fold_name(""); }));
    // K (the Kelvin sign) folds to k in Unicode: here it is no letter at all.
    CHECK(throws<Error>([] { fold_name("\xe2\x84\xaa"); }));
    CHECK(
        contains(complaint([] { fold_name("a\x1b[2J"); }), "\"a\\x1b[2J\" cannot be a user name"));
}

TEST_CASE("chapter 1: words of a line") {
    CHECK(split_words(" a  b\tc \r\n") == std::vector<std::string>{"a", "b", "c"});
    CHECK(split_words("  ").empty());
}

TEST_CASE("chapter 1: the time as RFC 3339 writes it, the same as `date` says") {
    std::string before = shell("date -u +%Y-%m-%dT%H:%M:%SZ");
    std::string now = rfc3339_now() + "\n";
    std::string after = shell("date -u +%Y-%m-%dT%H:%M:%SZ");
    CHECK(before <= now);  // texts of this form sort like the times that they mean
    CHECK(now <= after);
    CHECK(now.size() == before.size());
}

TEST_CASE("chapter 1: a file is written, replaced and read, and leaves nothing beside it") {
    TempDir dir;
    std::filesystem::path path = dir.path / "file";
    CHECK(read_file(path, 100) == std::nullopt);
    for (std::string_view content : {"first", "second, longer", "", "3rd"}) {
        write_file(path, as_bytes(content), FileMode::owner_only);
        CHECK(as_text(*read_file(path, 100)) == content);
    }
    CHECK_FALSE(std::filesystem::exists(dir.path / "file.new"));
}

TEST_CASE("chapter 1: a file larger than a block comes back whole") {
    TempDir dir;
    Bytes content = random_bytes(100'000);
    write_file(dir.path / "file", content, FileMode::owner_only);
    std::optional<SecretBytes> back = read_file(dir.path / "file", content.size());
    REQUIRE(back);
    CHECK(to_bytes(*back) == content);
}

TEST_CASE("chapter 1: files with secrets are for the owner alone, whatever the umask says") {
    TempDir dir;
    mode_t before = ::umask(0);
    write_file(dir.path / "secret", as_bytes("x"), FileMode::owner_only);
    write_file(dir.path / "public", as_bytes("x"), FileMode::readable_by_all);
    ::umask(before);
    CHECK(mode_of(dir.path / "secret") == owner_read_write);
    CHECK(mode_of(dir.path / "public") == (owner_read_write | std::filesystem::perms::group_read |
                                           std::filesystem::perms::others_read));
}

TEST_CASE("chapter 1: writing over a file that others can read closes it to them") {
    TempDir dir;
    write_text(dir.path / "file", "old");
    std::filesystem::permissions(dir.path / "file", std::filesystem::perms::all);
    write_file(dir.path / "file", as_bytes("new"), FileMode::owner_only);
    CHECK(mode_of(dir.path / "file") == owner_read_write);
}

TEST_CASE("chapter 1: what a crash left behind is no obstacle") {
    TempDir dir;
    write_text(dir.path / "file", "old");
    write_text(dir.path / "file.new", "half of the n");
    write_file(dir.path / "file", as_bytes("new"), FileMode::owner_only);
    CHECK(read_text(dir.path / "file") == "new");
    CHECK_FALSE(std::filesystem::exists(dir.path / "file.new"));
}

TEST_CASE("chapter 1: a link where the new file would be is not followed") {
    TempDir dir;
    write_text(dir.path / "victim", "precious");
    std::filesystem::create_symlink(dir.path / "victim", dir.path / "file.new");
    write_file(dir.path / "file", as_bytes("new"), FileMode::owner_only);
    CHECK(read_text(dir.path / "victim") == "precious");
    CHECK(read_text(dir.path / "file") == "new");
}

TEST_CASE("chapter 1: when writing fails, the old file is untouched and the reason is said") {
    TempDir dir;
    write_text(dir.path / "file", "old");
    std::filesystem::create_directories(dir.path / "file.new" / "in the way");
    std::string reason =
        complaint([&] { write_file(dir.path / "file", as_bytes("new"), FileMode::owner_only); });
    CHECK(contains(reason, "Cannot write " + (dir.path / "file").string() + " (create): "));
    CHECK(read_text(dir.path / "file") == "old");
}

TEST_CASE("chapter 1: when the last step fails, the new file is taken away again") {
    TempDir dir;
    std::filesystem::create_directories(dir.path / "file" / "in the way");
    CHECK(contains(
        complaint([&] { write_file(dir.path / "file", as_bytes("new"), FileMode::owner_only); }),
        "(rename)"));
    CHECK_FALSE(std::filesystem::exists(dir.path / "file.new"));
    CHECK(throws<Error>(
        [&] { write_file(dir.path / "missing" / "file", as_bytes("new"), FileMode::owner_only); }));
}

TEST_CASE("chapter 1: reading refuses a directory, and a file over its bound") {
    TempDir dir;
    CHECK(throws<Error>([&] { read_file(dir.path, 100); }));
    write_text(dir.path / "file", "12345");
    CHECK(read_file(dir.path / "file", 5)->size() == 5);
    CHECK(contains(complaint([&] { read_file(dir.path / "file", 4); }), "larger than 4 bytes"));
}

TEST_CASE("chapter 1: a private directory is the owner's, and may exist") {
    TempDir dir;
    make_private_directory(dir.path / "a" / "b");
    make_private_directory(dir.path / "a" / "b");
    CHECK(mode_of(dir.path / "a" / "b") == std::filesystem::perms::owner_all);
    write_text(dir.path / "file", "");
    CHECK(throws<Error>([&] { make_private_directory(dir.path / "file" / "below"); }));
}

TEST_CASE("chapter 1: a directory has one holder") {
    TempDir dir;
    {
        DirectoryLock lock(dir.path, false, "");
        CHECK_THROWS_WITH_AS(DirectoryLock(dir.path, false, "It is busy."), "It is busy.", Error);
    }
    CHECK_NOTHROW(DirectoryLock(dir.path, false, ""));
    CHECK(contains(complaint([&] { DirectoryLock(dir.path / "none", false, ""); }),
                   "Cannot open the directory"));
}

namespace {

// Another process, which waits for a word from us and then does `work`; its exit status is what
// `work` returns. Started before any lock is taken: a lock of flock() belongs to the open file,
// and a process that is forked later would share it.
class OtherProcess {
  public:
    explicit OtherProcess(const std::function<int()>& work) {
        if (::pipe(pipe_.data()) != 0) throw Error("No pipe.");
        process_ = ::fork();
        if (process_ != 0) return;
        char word = 0;
        ::_exit(::read(pipe_[0], &word, 1) == 1 ? work() : 99);
    }
    OtherProcess(const OtherProcess&) = delete;
    OtherProcess& operator=(const OtherProcess&) = delete;
    ~OtherProcess() {
        for (int end : pipe_) ::close(end);
    }
    void go() const { REQUIRE(::write(pipe_[1], "!", 1) == 1); }
    int wait() const {
        int status = 0;
        ::waitpid(process_, &status, 0);
        return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    }

  private:
    std::array<int, 2> pipe_{};
    pid_t process_ = 0;
};

}  // namespace

TEST_CASE("chapter 1: a directory that this process holds is busy for another one") {
    TempDir dir;
    OtherProcess other([&] {
        return complaint([&] { DirectoryLock(dir.path, false, "busy"); }) == "busy" ? 7 : 1;
    });
    DirectoryLock lock(dir.path, false, "");
    other.go();
    CHECK(other.wait() == 7);
}

TEST_CASE("chapter 1: another process can wait for the directory") {
    TempDir dir;
    OtherProcess other([&] {
        DirectoryLock lock(dir.path, true, "busy");
        return 7;
    });
    {
        DirectoryLock lock(dir.path, false, "");
        other.go();
    }
    CHECK(other.wait() == 7);
}

TEST_CASE("chapter 1: a directory is free again however its holder's process ended") {
    TempDir dir;
    OtherProcess other([&] {
        DirectoryLock lock(dir.path, false, "busy");
        ::_exit(7);  // no destructor
        return 1;
    });
    other.go();
    CHECK(other.wait() == 7);
    CHECK_NOTHROW(DirectoryLock(dir.path, false, "busy"));
}

// ---- Chapter 2. Sockets -------------------------------------------------------------------------

namespace {

// Reads until `size` bytes are there, or the stream ends.
std::string receive_text(Socket& socket, std::size_t size) {
    std::string text;
    while (text.size() < size) {
        Bytes block(size - text.size());
        std::size_t got = socket.read_some(block);
        if (got == 0) break;
        text += as_text(ByteView(block).first(got));
    }
    return text;
}

bool is_awake(const Waker& waker) {
    std::vector<detail::PollEntry> entries{{waker.handle(), POLLIN, 0}};
    return detail::poll_sockets(entries, 0) == 1;
}

// A socket that has a port and does not listen on it: nobody else can get the port meanwhile.
std::pair<Socket, std::uint16_t> deaf_socket() {
    Endpoint endpoint = resolve("127.0.0.1", 0, true).front();
    Socket socket = detail::new_socket(endpoint);
    REQUIRE(::bind(socket.handle(), endpoint.address(), endpoint.size) == 0);
    std::uint16_t port = socket.local_endpoint().port();
    return {std::move(socket), port};
}

}  // namespace

TEST_CASE("chapter 2: host and port are taken apart") {
    struct Case {
        std::string_view text, host;
        std::uint16_t port;
    };
    const Case cases[]{{"example.org", "example.org", 5000},
                       {"example.org:6000", "example.org", 6000},
                       {"127.0.0.1:1", "127.0.0.1", 1},
                       {"localhost:65535", "localhost", 65535},
                       {"::1", "::1", 5000},
                       {"2001:db8::7", "2001:db8::7", 5000},
                       {"[::1]", "::1", 5000},
                       {"[::1]:6000", "::1", 6000},
                       {"fe80::1%eth0", "fe80::1%eth0", 5000}};
    for (const Case& c : cases) {
        CAPTURE(c.text);
        HostPort parsed = parse_host_port(c.text, 5000);
        CHECK(parsed.host == c.host);
        CHECK(parsed.port == c.port);
    }
}

TEST_CASE("chapter 2: a host and port that cannot be are refused") {
    for (std::string_view bad :
         {"", ":5000", "host:", "host:0", "host:65536", "host:-1", "host:+1", "host:5000x",
          "host: 1", "host:0x10", "[::1", "[::1]5000", "[]:5000", "[]", "[::1]:0", "[::1]:x"}) {
        CAPTURE(bad);
        CHECK(throws<Error>([&] { parse_host_port(bad, 5000); }));
    }
    CHECK(contains(complaint([] { parse_host_port("h:99999", 1); }), "\"99999\" is not a port"));
}

TEST_CASE("chapter 2: an endpoint prints as people write it") {
    CHECK(resolve("127.0.0.1", 5000, false).front().text() == "127.0.0.1:5000");
    CHECK(resolve("127.0.0.1", 5000, false).front().host() == "127.0.0.1");
    CHECK(resolve("::1", 5000, false).front().text() == "[::1]:5000");
    CHECK(resolve("::1", 5000, false).front().host() == "::1");
    CHECK(resolve("::1", 65535, false).front().port() == 65535);
}

TEST_CASE("chapter 2: bytes go through a connection both ways, and its end is seen") {
    auto [a, b] = socket_pair();
    a.write_all(as_bytes("ping"));
    CHECK(receive_text(b, 4) == "ping");
    b.write_all(as_bytes("pong"));
    CHECK(receive_text(a, 4) == "pong");
    a.finish_writing();
    Bytes block(10);
    CHECK(b.read_some(block) == 0);
    b.write_all(as_bytes("still open"));  // the other direction
    CHECK(receive_text(a, 10) == "still open");
}

TEST_CASE("chapter 2: a listener tells who came") {
    Listener listener("127.0.0.1", 0);
    Waker never;
    Socket client = connect_to("127.0.0.1", listener.port(), Milliseconds(5000), never);
    auto accepted = listener.accept(never);
    REQUIRE(accepted);
    CHECK(accepted->from.text() == client.local_endpoint().text());
    CHECK(accepted->socket.remote_endpoint().text() == client.local_endpoint().text());
    CHECK(listener.addresses() == std::vector<std::string>{concat("127.0.0.1:", listener.port())});
}

TEST_CASE("chapter 2: a megabyte goes through in one write and many reads") {
    auto [a, b] = socket_pair();
    Bytes content = random_bytes(std::size_t{1} << 20);
    std::thread writer([&a = a, &content] {
        a.write_all(content);
        a.finish_writing();
    });
    std::string received = receive_text(b, content.size() + 1);
    writer.join();
    CHECK(received == as_text(content));
}

TEST_CASE("chapter 2: a refused connection is explained") {
    auto [deaf, port] = deaf_socket();
    Waker never;
    std::string reason;
    try {
        connect_to("127.0.0.1", port, Milliseconds(5000), never);
    } catch (const NetworkError& e) {
        reason = e.what();
    }
    CHECK(contains(reason, concat("Cannot connect to 127.0.0.1 port ", port, ": ")));
    CHECK(contains(reason, "refused"));
    CHECK(contains(reason, "Is the server running"));
}

TEST_CASE("chapter 2: connecting ends when its time is over, and when it is cancelled") {
    // A listener that accepts nobody: when its queue is full, the system leaves newcomers waiting.
    auto [deaf, port] = deaf_socket();
    REQUIRE(::listen(deaf.handle(), 0) == 0);
    Waker waker;
    std::vector<Socket> queued;
    std::string reason = "";
    while (reason.empty() && queued.size() < 100)
        reason = complaint([&, port = port] {
            queued.push_back(connect_to("127.0.0.1", port, Milliseconds(30), waker));
        });
    if (reason.empty()) {
        MESSAGE("skipped: this system's queue has no end");
        return;
    }
    CHECK(contains(reason, "no answer"));

    waker.wake();  // an hour would be a long test
    CHECK(contains(complaint([&, port = port] {
                       connect_to("127.0.0.1", port, std::chrono::hours(1), waker);
                   }),
                   "cancelled"));
}

TEST_CASE("chapter 2: silence ends in TimedOut, and the connection is still good") {
    auto [a, b] = socket_pair();
    a.set_read_timeout(Milliseconds(1));
    Bytes block(10);
    CHECK(throws<TimedOut>([&a = a, &block] { a.read_some(block); }));
    a.set_read_timeout(Milliseconds(0));  // means the shortest time, not "for ever"
    CHECK(throws<TimedOut>([&a = a, &block] { a.read_some(block); }));
    a.set_read_timeout(Milliseconds(5000));
    b.write_all(as_bytes("hello"));
    CHECK(receive_text(a, 5) == "hello");
}

TEST_CASE("chapter 2: a peer that takes nothing ends in TimedOut") {
    auto [a, b] = socket_pair();
    a.set_write_timeout(Milliseconds(20));
    const Bytes block(1 << 20);
    CHECK(throws<TimedOut>([&a = a, &block] {
        for (int i = 0; i < 1000; ++i) a.write_all(block);
    }));
}

TEST_CASE("chapter 2: shutting down wakes a reader in another thread") {
    auto [a, b] = socket_pair();
    std::size_t got = 1;
    std::thread reader([&a = a, &got] {
        Bytes block(10);
        got = a.read_some(block);
    });
    a.shut_down();
    reader.join();
    CHECK(got == 0);
}

TEST_CASE("chapter 2: shutting down wakes a writer in another thread") {
    auto [a, b] = socket_pair();
    bool ended = false;
    std::thread writer([&a = a, &ended] {
        const Bytes block(1 << 20);
        ended = throws<NetworkError>([&] {
            for (;;) a.write_all(block);
        });
    });
    a.shut_down();
    writer.join();
    CHECK(ended);
}

TEST_CASE("chapter 2: writing to a connection that the other side closed is an error, no signal") {
    auto [a, b] = socket_pair();
    b = Socket();
    const Bytes block(1000);
    CHECK(throws<NetworkError>([&a = a, &block] {
        for (;;) a.write_all(block);  // a SIGPIPE would end the whole test program
    }));
}

TEST_CASE("chapter 2: a polite end brings the last words across, unread data or not") {
    auto [a, b] = socket_pair();
    a.write_all(as_bytes("nobody reads this"));
    b.write_all(as_bytes("goodbye"));
    std::thread polite([&b = b] {
        b.close_politely(Milliseconds(5000));
        b = Socket();
    });
    CHECK(receive_text(a, 100) == "goodbye");
    a = Socket();
    polite.join();
}

TEST_CASE("chapter 2: a polite end does not wait for ever") {
    auto [a, b] = socket_pair();
    CHECK_NOTHROW(b.close_politely(Milliseconds(5)));  // `a` never ends
}

TEST_CASE("chapter 2: a port in use is explained") {
    Listener first("127.0.0.1", 0);
    std::string reason;
    try {
        Listener second("127.0.0.1", first.port());
    } catch (const NetworkError& e) {
        reason = e.what();
    }
    CHECK(contains(reason, concat("Cannot listen on 127.0.0.1:", first.port(), ": ")));
    CHECK(contains(reason, "--port"));
}

TEST_CASE("chapter 2: a server that restarts gets its port back at once") {
    Waker never;
    std::optional<Listener> listener(std::in_place, "127.0.0.1", std::uint16_t{0});
    std::uint16_t port = listener->port();
    {
        Socket client = connect_to("127.0.0.1", port, Milliseconds(5000), never);
        Socket server = std::move(listener->accept(never)->socket);
        server = Socket();  // who closes first lingers in TIME_WAIT
    }
    listener.reset();
    CHECK_NOTHROW(Listener("127.0.0.1", port));
}

TEST_CASE("chapter 2: IPv6") {
    std::optional<Listener> listener;
    try {
        listener.emplace("::1", std::uint16_t{0});
    } catch (const NetworkError& e) {
        MESSAGE("skipped, there is no IPv6 here: ", e.what());
        return;
    }
    Waker never;
    Socket client = connect_to("::1", listener->port(), Milliseconds(5000), never);
    auto accepted = listener->accept(never);
    REQUIRE(accepted);
    CHECK(accepted->from.host() == "::1");
}

TEST_CASE("chapter 2: connecting to localhost finds a listener on either of its addresses") {
    Waker never;
    Listener listener("127.0.0.1", 0);
    Socket client = connect_to("localhost", listener.port(), Milliseconds(5000), never);
    CHECK(listener.accept(never));
}

TEST_CASE("chapter 2: accept is woken by a Waker, before and while it waits") {
    Listener listener("127.0.0.1", 0);
    Waker waker;
    waker.wake();
    CHECK_FALSE(listener.accept(waker));
    waker.drain();

    bool nobody = false;
    std::thread acceptor([&] { nobody = !listener.accept(waker); });
    waker.wake();
    acceptor.join();
    CHECK(nobody);
}

TEST_CASE("chapter 2: a Waker stays awake until it is drained") {
    Waker waker;
    CHECK_FALSE(is_awake(waker));
    for (int i = 0; i < 100'000; ++i) waker.wake();  // more than a pipe holds: does not block
    CHECK(is_awake(waker));
    CHECK(is_awake(waker));
    waker.drain();
    CHECK_FALSE(is_awake(waker));
}

TEST_CASE("chapter 2: a Waker leaves errno alone, for the code that a signal interrupts") {
    Waker waker;
    errno = ENOENT;
    for (int i = 0; i < 100'000; ++i) waker.wake();
    CHECK(errno == ENOENT);
}

TEST_CASE("chapter 2: out of descriptors, a newcomer is turned away and the next is served") {
    Listener listener("127.0.0.1", 0);
    Waker never;
    Socket unlucky = connect_to("127.0.0.1", listener.port(), Milliseconds(5000), never);
    unlucky.set_read_timeout(Milliseconds(5000));
    {
        rlimit before{};
        ::getrlimit(RLIMIT_NOFILE, &before);
        rlimit few = before;
        few.rlim_cur = 128;
        ::setrlimit(RLIMIT_NOFILE, &few);
        std::vector<int> taken;
        for (int copy; (copy = ::dup(0)) >= 0;) taken.push_back(copy);
        std::string reason = complaint([&] { listener.accept(never); });
        for (int copy : taken) ::close(copy);
        ::setrlimit(RLIMIT_NOFILE, &before);
        CHECK(contains(reason, "A newcomer was turned away"));
    }
    Bytes block(10);
    CHECK(unlucky.read_some(block) == 0);
    Socket lucky = connect_to("127.0.0.1", listener.port(), Milliseconds(5000), never);
    CHECK(listener.accept(never));
}

TEST_CASE("chapter 2: a colon behind a bracket wants a port, as behind a name") {
    CHECK(throws<Error>([] { parse_host_port("[::1]:", 5000); }));
}

// ---- Chapter 3. Framing -------------------------------------------------------------------------

TEST_CASE("chapter 3: a frame is its length and its bytes") {
    CHECK(to_hex(make_frame(as_bytes("abc"))) == "00000003616263");
    CHECK(to_hex(make_frame({})) == "00000000");
    CHECK(to_hex(frame_header(0x01020304)) == "01020304");
    CHECK(frame_length(from_hex("00000007"), 7) == 7);
    CHECK(throws<ProtocolError>([] { frame_length(from_hex("00000008"), 7); }));
    CHECK(throws<ProtocolError>([] { frame_length(from_hex("ffffffff"), 7); }));
}

TEST_CASE("chapter 3: a frame that comes byte by byte arrives whole") {
    auto [a, b] = socket_pair();
    FrameReader frames(b, 100);
    frames.set_patience(Milliseconds(1));
    Bytes wire = make_frame(as_bytes("abc"));
    for (std::uint8_t byte : wire) {
        CHECK(throws<TimedOut>([&] { frames.next(100); }));  // not yet; nothing is lost
        a.write_all({&byte, 1});
    }
    CHECK(as_text(*frames.next(100)) == "abc");
}

TEST_CASE("chapter 3: frames that come in one piece are taken apart") {
    auto [a, b] = socket_pair();
    FrameReader frames(b, 100);
    a.write_all(join(make_frame(as_bytes("one")), make_frame({}), make_frame(as_bytes("three"))));
    a.finish_writing();
    CHECK(as_text(*frames.next(100)) == "one");
    CHECK(as_text(*frames.next(100)) == "");
    CHECK(as_text(*frames.next(100)) == "three");
    CHECK_FALSE(frames.next(100));
}

TEST_CASE("chapter 3: frames of all sizes, one after the other, through a small buffer") {
    auto [a, b] = socket_pair();
    constexpr std::size_t largest = 300;
    std::thread writer([&a = a] {
        Bytes wire;
        for (std::size_t size = 0; size <= largest; ++size)
            append(wire, make_frame(Bytes(size, static_cast<std::uint8_t>(size))));
        a.write_all(wire);
        a.finish_writing();
    });
    FrameReader frames(b, largest);
    std::size_t good = 0;
    for (std::size_t size = 0; size <= largest; ++size) {
        auto frame = frames.next(largest);
        good += frame && to_bytes(*frame) == Bytes(size, static_cast<std::uint8_t>(size)) ? 1 : 0;
    }
    bool ended = !frames.next(largest);
    writer.join();
    CHECK(good == largest + 1);
    CHECK(ended);
}

TEST_CASE("chapter 3: a frame over the limit is refused before its bytes come") {
    auto [a, b] = socket_pair();
    FrameReader frames(b, 1000);
    a.write_all(frame_header(101));  // and not one byte more
    CHECK(throws<ProtocolError>([&] { frames.next(100); }));
}

TEST_CASE("chapter 3: an end between frames is an end, an end inside a frame is an error") {
    Bytes wire = make_frame(as_bytes("abc"));
    for (std::size_t size = 0; size < wire.size(); ++size) {
        CAPTURE(size);
        auto [a, b] = socket_pair();
        FrameReader frames(b, 100);
        a.write_all(wire);
        a.write_all(ByteView(wire).first(size));
        a.finish_writing();
        CHECK(as_text(*frames.next(100)) == "abc");
        if (size == 0)
            CHECK_FALSE(frames.next(100));
        else
            CHECK(throws<NetworkError>([&] { frames.next(100); }));
    }
}

TEST_CASE("chapter 3: behind a deadline, one more byte buys no more time") {
    auto [a, b] = socket_pair();
    FrameReader frames(b, 100);
    frames.set_deadline(Clock::now() + Milliseconds(5));
    CHECK(throws<TimedOut>([&] { frames.next(100); }));
    a.write_all(Bytes{0});
    CHECK(throws<TimedOut>([&] { frames.next(100); }));
    // With new patience the same frame can still be completed.
    frames.set_patience(Milliseconds(5000));
    a.write_all(from_hex("00000178"));
    CHECK(as_text(*frames.next(100)) == "x");
}

TEST_CASE("chapter 3: behind a deadline, a frame that is there is too late") {
    auto [a, b] = socket_pair();
    FrameReader frames(b, 100);
    a.write_all(make_frame(as_bytes("late")));
    frames.set_deadline(Clock::now());
    CHECK(throws<TimedOut>([&] { frames.next(100); }));
    frames.set_patience(Milliseconds(5000));
    CHECK(as_text(*frames.next(100)) == "late");
}

TEST_CASE("chapter 3: a deadline stops who sends a byte every few milliseconds") {
    auto [a, b] = socket_pair();
    Waker enough;
    std::thread dripping([&a = a, &enough] {  // this frame would take 100 seconds
        a.write_all(frame_header(50'000));
        std::vector<detail::PollEntry> entries{{enough.handle(), POLLIN, 0}};
        while (detail::poll_sockets(entries, 2) == 0) a.write_all(Bytes{0});
    });
    FrameReader frames(b, 50'000);
    auto start = Clock::now();
    frames.set_deadline(start + Milliseconds(50));
    bool stopped = throws<TimedOut>([&] { frames.next(50'000); });
    auto took = Clock::now() - start;
    enough.wake();
    dripping.join();
    CHECK(stopped);
    CHECK(took >= Milliseconds(50));
    CHECK(took < std::chrono::seconds(50));
}

// ---- Chapter 4. RSA and friends -----------------------------------------------------------------

namespace {

std::string quoted(const std::filesystem::path& path) { return "'" + path.string() + "'"; }

// The first word that a command prints.
std::string word_of(const std::string& command) { return split_words(shell(command)).at(0); }

using ParamBuilder = std::unique_ptr<OSSL_PARAM_BLD, detail::Freed<OSSL_PARAM_BLD_free>>;

// The SPKI of an RSA key that nobody holds, with the modulus and exponent that we want.
Bytes made_up_rsa_der(int bits, std::uint64_t exponent) {
    detail::BignumPtr n(::BN_new()), e(::BN_new());
    ::BN_rand(n.get(), bits, BN_RAND_TOP_ONE, BN_RAND_BOTTOM_ODD);
    ::BN_set_word(e.get(), exponent);
    ParamBuilder builder(::OSSL_PARAM_BLD_new());
    ::OSSL_PARAM_BLD_push_BN(builder.get(), OSSL_PKEY_PARAM_RSA_N, n.get());
    ::OSSL_PARAM_BLD_push_BN(builder.get(), OSSL_PKEY_PARAM_RSA_E, e.get());
    std::unique_ptr<OSSL_PARAM, detail::Freed<OSSL_PARAM_free>> params(
        ::OSSL_PARAM_BLD_to_param(builder.get()));
    detail::PkeyContext context(::EVP_PKEY_CTX_new_from_name(nullptr, "RSA", nullptr));
    ::EVP_PKEY_fromdata_init(context.get());
    EVP_PKEY* key = nullptr;
    ::EVP_PKEY_fromdata(context.get(), &key, EVP_PKEY_PUBLIC_KEY, params.get());
    return RsaPublicKey(detail::PkeyPtr(key)).der();
}

Secret<32> secret_from_hex(std::string_view hex) { return Secret<32>(from_hex(hex)); }
X25519Public public_from_hex(std::string_view hex) {
    X25519Public key{};
    Bytes bytes = from_hex(hex);
    std::copy(bytes.begin(), bytes.end(), key.begin());
    return key;
}

Bytes gcm_seal(const Secret<32>& key, std::uint64_t number, ByteView aad, ByteView text) {
    Bytes sealed = to_bytes(text);
    sealed.resize(text.size() + gcm_tag_bytes);
    ByteSpan all(sealed);
    GcmSealer(key).seal(Nonce(number), aad, all.first(text.size()), all.last<gcm_tag_bytes>());
    return sealed;
}
std::optional<Bytes> gcm_open(const Secret<32>& key, std::uint64_t number, ByteView aad,
                              Bytes sealed) {
    std::optional<ByteSpan> text = GcmOpener(key).open(Nonce(number), aad, sealed);
    if (!text) return std::nullopt;
    return to_bytes(*text);
}

}  // namespace

TEST_CASE("chapter 4: SHA-256, the examples of FIPS 180") {
    CHECK(to_hex(sha256(as_bytes("abc"))) ==
          "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    CHECK(to_hex(sha256(as_bytes(""))) ==
          "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    CHECK(sha256(as_bytes("a"), as_bytes(""), as_bytes("bc")) == sha256(as_bytes("abc")));
}

TEST_CASE("chapter 4: HMAC-SHA256, RFC 4231") {
    struct Vector {
        Bytes key, message;
        std::string_view mac;
    };
    const Vector vectors[]{
        {Bytes(20, 0x0b), bytes_of("Hi There"),
         "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"},
        {bytes_of("Jefe"), bytes_of("what do ya want for nothing?"),
         "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"},
        {Bytes(20, 0xaa), Bytes(50, 0xdd),
         "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe"},
        {Bytes(131, 0xaa), bytes_of("Test Using Larger Than Block-Size Key - Hash Key First"),
         "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"},
    };
    for (const Vector& v : vectors) {
        Digest mac{};
        hmac_sha256(v.key, v.message, mac);
        CHECK(to_hex(mac) == v.mac);
    }
}

TEST_CASE("chapter 4: HKDF-SHA256, RFC 5869 appendix A (the first 32 bytes)") {
    auto counting = [](unsigned from, unsigned to) {
        Bytes bytes;
        for (unsigned i = from; i <= to; ++i) bytes.push_back(static_cast<std::uint8_t>(i));
        return bytes;
    };
    struct Vector {
        Bytes ikm, salt, info;
        std::string_view prk, okm;
    };
    const Vector vectors[]{
        {Bytes(22, 0x0b), counting(0x00, 0x0c), counting(0xf0, 0xf9),
         "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5",
         "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"},
        {counting(0x00, 0x4f), counting(0x60, 0xaf), counting(0xb0, 0xff),
         "06a6b88c5853361a06104c9ceb35b45cef760014904671014a193f40c15fc244",
         "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c"},
        {Bytes(22, 0x0b),
         {},
         {},
         "19ef24a32c717b167f33a91d6f648bdf96596776afdb6377ac434c1c293ccb04",
         "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"},
    };
    for (const Vector& v : vectors) {
        Secret<32> prk = hkdf_extract(v.salt, v.ikm);
        CHECK(hex_of(prk) == v.prk);
        CHECK(hex_of(hkdf_expand(prk, as_text(v.info))) == v.okm);
    }
}

TEST_CASE("chapter 4: agree() is HKDF-Extract over both secrets, in their order") {
    Bytes transcript = bytes_of("transcript");
    Secret<32> expected = hkdf_extract(transcript, join(Bytes(32, 1), Bytes(32, 2)));
    CHECK(hex_of(agree(transcript, secret_of(1), secret_of(2))) == hex_of(expected));
    CHECK(hex_of(agree(transcript, secret_of(2), secret_of(1))) != hex_of(expected));
}

TEST_CASE("chapter 4: PBKDF2-HMAC-SHA256, the known vectors") {
    struct Vector {
        std::uint32_t iterations;
        std::string_view hash;
    };
    for (const Vector& v :
         {Vector{1, "120fb6cffcf8b32c43e7225256c4f837a86548c92ccc35480805987cb70be17b"},
          Vector{2, "ae4d0c95af6b46d32d0adff928f06dd02a303f8ef3c251dfd6e2d85a95474c43"},
          Vector{4096, "c5e478d59288c841aa530db6845c4c8d962893a001ce4e11a4963873aa98134a"}})
        CHECK(hex_of(pbkdf2_sha256(as_bytes("password"), as_bytes("salt"), v.iterations)) ==
              v.hash);
}

TEST_CASE("chapter 4: X25519, RFC 7748 section 5.2") {
    struct Vector {
        std::string_view scalar, point, result;
    };
    for (const Vector& v :
         {Vector{"a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
                 "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
                 "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"},
          Vector{"4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
                 "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
                 "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957"}})
        CHECK(hex_of(X25519Key::from_private(secret_from_hex(v.scalar))
                         .shared_secret(public_from_hex(v.point))) == v.result);
}

TEST_CASE("chapter 4: X25519 between Alice and Bob, RFC 7748 section 6.1") {
    X25519Key alice = X25519Key::from_private(
        secret_from_hex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"));
    X25519Key bob = X25519Key::from_private(
        secret_from_hex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"));
    CHECK(to_hex(alice.public_key()) ==
          "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a");
    CHECK(to_hex(bob.public_key()) ==
          "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f");
    for (const Secret<32>& shared :
         {alice.shared_secret(bob.public_key()), bob.shared_secret(alice.public_key())})
        CHECK(hex_of(shared) == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742");
}

TEST_CASE("chapter 4: X25519 keys that would make the secret zero are refused") {
    X25519Key key = X25519Key::generate();
    for (std::string_view bad :
         {"0000000000000000000000000000000000000000000000000000000000000000",   // 0
          "0100000000000000000000000000000000000000000000000000000000000000",   // 1
          "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",   // of order 8
          "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",   // of order 8
          "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",   // p - 1
          "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",   // p, which is 0
          "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"})  // p + 1
        CHECK(throws<ProtocolError>([&] { key.shared_secret(public_from_hex(bad)); }));
}

TEST_CASE("chapter 4: AES-256-GCM, test cases 13 and 14 of McGrew and Viega") {
    Secret<32> zero;
    CHECK(to_hex(gcm_seal(zero, 0, {}, {})) == "530f8afbc74536b9a963b4f1c4cb738b");
    CHECK(to_hex(gcm_seal(zero, 0, {}, Bytes(16))) ==
          "cea7403d4d606b6e074ec5d3baf39d18"
          "d0d1c8a799996bf0265b98b5d48ab919");
}

TEST_CASE("chapter 4: AES-256-GCM with counter nonce and aad, as OpenSSL does it by itself") {
    Secret<32> key = secret_of(9);
    Bytes aad = bytes_of("header"), text = bytes_of("some text");
    const Bytes iv = from_hex("000000000102030405060708");  // 0 (u32) || number (u64)

    detail::CipherContext context(::EVP_CIPHER_CTX_new());
    Bytes expected(text.size() + 16);
    int size = 0;
    ::EVP_EncryptInit_ex(context.get(), ::EVP_aes_256_gcm(), nullptr, key.view().data(), iv.data());
    ::EVP_EncryptUpdate(context.get(), nullptr, &size, aad.data(), static_cast<int>(aad.size()));
    ::EVP_EncryptUpdate(context.get(), expected.data(), &size, text.data(),
                        static_cast<int>(text.size()));
    ::EVP_EncryptFinal_ex(context.get(), nullptr, &size);
    ::EVP_CIPHER_CTX_ctrl(context.get(), EVP_CTRL_GCM_GET_TAG, 16, expected.data() + text.size());

    CHECK(to_hex(gcm_seal(key, 0x0102030405060708, aad, text)) == to_hex(expected));
    CHECK(gcm_open(key, 0x0102030405060708, aad, expected) == text);
}

TEST_CASE("chapter 4: AES-256-GCM opens nothing that was changed") {
    Secret<32> key = secret_of(9);
    Bytes aad = bytes_of("aad"), text = bytes_of("some text");
    const Bytes sealed = gcm_seal(key, 5, aad, text);
    REQUIRE(gcm_open(key, 5, aad, sealed) == text);
    for (std::size_t bit = 0; bit < 8 * sealed.size(); ++bit) {
        Bytes changed = sealed;
        changed[bit / 8] ^= static_cast<std::uint8_t>(1 << bit % 8);
        CHECK_FALSE(gcm_open(key, 5, aad, changed));
    }
    for (std::size_t size = 0; size < sealed.size(); ++size)
        CHECK_FALSE(gcm_open(key, 5, aad, to_bytes(ByteView(sealed).first(size))));
    CHECK_FALSE(gcm_open(key, 5, aad, join(sealed, Bytes(1))));
    CHECK_FALSE(gcm_open(key, 6, aad, sealed));
    CHECK_FALSE(gcm_open(key, 5, {}, sealed));
    CHECK_FALSE(gcm_open(key, 5, bytes_of("aae"), sealed));
    CHECK_FALSE(gcm_open(secret_of(8), 5, aad, sealed));
}

TEST_CASE("chapter 4: one cipher object serves many messages, also after a bad one") {
    Secret<32> key = secret_of(3);
    GcmOpener opener(key);
    for (std::uint64_t number = 0; number < 10; ++number) {
        Bytes sealed = gcm_seal(key, number, {}, Bytes(number, 'x'));
        Bytes bad = sealed;
        bad.back() ^= 1;
        CHECK_FALSE(opener.open(Nonce(number), {}, bad));
        std::optional<ByteSpan> text = opener.open(Nonce(number), {}, sealed);
        REQUIRE(text);
        CHECK(text->size() == number);
    }
}

TEST_CASE("chapter 4: random bytes are all different") {
    std::set<Bytes> seen;
    for (int i = 0; i < 1000; ++i) seen.insert(random_bytes(16));
    CHECK(seen.size() == 1000);
    CHECK(hex_of(random_secret<32>()) != hex_of(random_secret<32>()));
}

TEST_CASE("chapter 4: an OAEP box opens with its key and its label, and not otherwise") {
    const RsaPublicKey& to = test_key(0).public_key();
    Secret<32> secret = secret_of(5);
    Bytes label = bytes_of("label");
    Bytes box = to.encrypt(secret, label);
    CHECK(box.size() == 256);
    CHECK(box != to.encrypt(secret, label));  // no two boxes are alike

    auto opened = test_key(0).decrypt(box, label);
    REQUIRE(opened);
    CHECK(hex_of(*opened) == hex_of(secret));
    CHECK_FALSE(test_key(0).decrypt(box, bytes_of("Label")));
    CHECK_FALSE(test_key(0).decrypt(box, {}));
    CHECK_FALSE(test_key(1).decrypt(box, label));
    CHECK_FALSE(test_key(0).decrypt({}, label));
    CHECK_FALSE(test_key(0).decrypt(ByteView(box).first(255), label));
    CHECK_FALSE(test_key(0).decrypt(join(box, Bytes(1)), label));
    CHECK_FALSE(test_key(0).decrypt(Bytes(256, 0xff), label));
    for (std::size_t at : {0U, 1U, 100U, 254U, 255U}) {
        Bytes changed = box;
        changed[at] ^= 1;
        CHECK_FALSE(test_key(0).decrypt(changed, label));
    }
}

TEST_CASE("chapter 4: instead of a box that does not open there is a random secret") {
    Bytes box = test_key(0).public_key().encrypt(secret_of(5), {});
    CHECK(hex_of(test_key(0).decrypt_or_random(box, {})) == hex_of(secret_of(5)));
    box[100] ^= 1;
    std::string once = hex_of(test_key(0).decrypt_or_random(box, {}));
    std::string twice = hex_of(test_key(0).decrypt_or_random(box, {}));
    CHECK(once != twice);
    CHECK(once != std::string(64, '0'));
}

TEST_CASE("chapter 4: a PSS signature belongs to one message and one key") {
    Bytes message = bytes_of("I was here.");
    Bytes signature = test_key(0).sign(message);
    CHECK(test_key(0).public_key().verify(message, signature));
    CHECK(test_key(0).public_key().verify({}, test_key(0).sign({})));
    CHECK_FALSE(test_key(0).public_key().verify(bytes_of("I was there."), signature));
    CHECK_FALSE(test_key(1).public_key().verify(message, signature));
    CHECK_FALSE(test_key(0).public_key().verify(message, {}));
    CHECK_FALSE(test_key(0).public_key().verify(message, ByteView(signature).first(255)));
    CHECK_FALSE(test_key(0).public_key().verify(message, join(signature, Bytes(1))));
    for (std::size_t at = 0; at < signature.size(); at += 15) {
        Bytes changed = signature;
        changed[at] ^= 0x10;
        CHECK_FALSE(test_key(0).public_key().verify(message, changed));
    }
}

TEST_CASE("chapter 4: keys that we do not compute with are refused") {
    struct Case {
        Bytes der;
        std::string_view reason;
    };
    const Bytes good = test_key(0).public_key().der();
    const Case cases[]{
        {made_up_rsa_der(1024, 65537), "of 1024 bits; 2048 to 4096 are accepted"},
        {made_up_rsa_der(2047, 65537), "of 2047 bits"},
        {made_up_rsa_der(4097, 65537), "of 4097 bits"},
        {made_up_rsa_der(2048, 3), "unusual public exponent"},
        {made_up_rsa_der(2048, 65536), "unusual public exponent"},        // even
        {made_up_rsa_der(2048, 0x100000001), "unusual public exponent"},  // slow
        {{}, "no RSA key"},
        {bytes_of("garbage"), "no RSA key"},
        {to_bytes(ByteView(good).first(good.size() - 1)), "no RSA key"},
        {join(good, Bytes(1)), "bytes behind it"},
        {from_hex("302a300506032b656e032100" + std::string(64, '9')), "no RSA key"},  // X25519's
    };
    for (const Case& c : cases)
        CHECK(contains(complaint([&] { RsaPublicKey::from_der(c.der); }), c.reason));
    CHECK_NOTHROW(RsaPublicKey::from_der(made_up_rsa_der(2048, 65537)));
    CHECK_NOTHROW(RsaPublicKey::from_der(made_up_rsa_der(4096, 0xffffffff)));
}

TEST_CASE("chapter 4: a public key goes through DER and PEM") {
    const RsaPublicKey& key = test_key(0).public_key();
    CHECK(RsaPublicKey::from_der(key.der()).der() == key.der());
    CHECK(RsaPublicKey::from_pem(as_bytes(key.pem()), "a file").fingerprint() == key.fingerprint());
    CHECK(contains(complaint([] { RsaPublicKey::from_pem(as_bytes("no PEM"), "key.pem"); }),
                   "key.pem holds no RSA key"));
}

TEST_CASE("chapter 4: a private key is saved and loaded, with a password and without") {
    TempDir dir;
    for (std::string password : {std::string(), std::string("correct horse"),
                                 std::string("p\xc3\xa4ssword"), std::string(1024, 'x')}) {
        CAPTURE(password.size());
        std::filesystem::path path = dir.path / "key.pem";
        test_key(0).save(path, as_bytes(password), 4096);
        CHECK(mode_of(path) == owner_read_write);
        CHECK(contains(read_text(path), password.empty()
                                            ? "-----BEGIN PRIVATE KEY-----"
                                            : "-----BEGIN ENCRYPTED PRIVATE KEY-----"));
        auto loaded = RsaPrivateKey::load(path, as_bytes(password));
        REQUIRE(loaded);
        CHECK(loaded->public_key().der() == test_key(0).public_key().der());
        CHECK(hex_of(loaded->derived_secret("x")) == hex_of(test_key(0).derived_secret("x")));
    }
}

TEST_CASE("chapter 4: a private key does not load with a wrong password, nor from a bad file") {
    TempDir dir;
    std::filesystem::path path = dir.path / "key.pem";
    CHECK_FALSE(RsaPrivateKey::load(path, {}));  // no file: nothing, not an error
    test_key(0).save(path, as_bytes("right password"), 4096);
    CHECK(contains(complaint([&] { RsaPrivateKey::load(path, as_bytes("wrong password")); }),
                   "no private key that opens with this password"));
    CHECK(throws<Error>([&] { RsaPrivateKey::load(path, {}); }));
    CHECK(throws<Error>([&] { RsaPrivateKey::load(path, as_bytes(std::string(2000, 'x'))); }));
    for (std::string_view content : {"", "garbage", "-----BEGIN PRIVATE KEY-----\nAAAA\n"}) {
        write_text(path, content);
        CHECK(throws<Error>([&] { RsaPrivateKey::load(path, {}); }));
    }
    RsaPrivateKey::generate(1024).save(path, {}, 4096);
    CHECK(contains(complaint([&] { RsaPrivateKey::load(path, {}); }), "1024 bits"));
}

TEST_CASE("chapter 4: secrets derived from a key differ by key and by label") {
    CHECK(hex_of(test_key(0).derived_secret("a")) == hex_of(test_key(0).derived_secret("a")));
    CHECK(hex_of(test_key(0).derived_secret("a")) != hex_of(test_key(0).derived_secret("b")));
    CHECK(hex_of(test_key(0).derived_secret("a")) != hex_of(test_key(1).derived_secret("a")));
}

TEST_CASE("chapter 4: a fingerprint is what other tools compute") {
    TempDir dir;
    write_text(dir.path / "public.pem", test_key(0).public_key().pem());
    std::string other = word_of("openssl pkey -pubin -in " + quoted(dir.path / "public.pem") +
                                " -outform DER | openssl dgst -sha256 -binary | openssl base64 -A");
    CHECK(test_key(0).public_key().fingerprint().text() ==
          "SHA256:" + other.substr(0, other.find('=')));
}

TEST_CASE("chapter 4: a fingerprint reads its own text and nothing else") {
    Fingerprint fingerprint = test_key(0).public_key().fingerprint();
    std::string text = fingerprint.text();
    CHECK(text.size() == 7 + 43);
    CHECK(Fingerprint::parse(text) == fingerprint);
    for (const std::string& bad :
         {std::string(), std::string("SHA256:"), text + "=", text.substr(0, 49), text.substr(7),
          "sha256" + text.substr(6), "MD5:" + text.substr(4), " " + text, text + " ",
          text.substr(0, 20) + "*" + text.substr(21), text.substr(0, 49) + "B"})
        CHECK(throws<Error>([&] { Fingerprint::parse(bad); }));
}

TEST_CASE("chapter 4: the openssl command reads our private key and names the same public key") {
    TempDir dir;
    std::filesystem::path locked = dir.path / "locked.pem", plain = dir.path / "plain.pem";
    test_key(0).save(locked, as_bytes("a passphrase"), 4096);
    test_key(0).save(plain, {}, 0);
    std::string pem = test_key(0).public_key().pem();
    CHECK(shell("PASS='a passphrase' openssl pkey -pubout -passin env:PASS -in " +
                quoted(locked)) == pem);
    CHECK(shell("openssl pkey -pubout -in " + quoted(plain)) == pem);
    std::string structure = shell("openssl asn1parse -in " + quoted(locked));
    for (std::string_view part : {"PBES2", "PBKDF2", "hmacWithSHA256", "aes-256-cbc", ":1000"})
        CHECK(contains(structure, part));  // 0x1000 iterations
}

TEST_CASE("chapter 4: we read private keys of the openssl command") {
    TempDir dir;
    std::string plain = quoted(dir.path / "plain.pem"), locked = quoted(dir.path / "locked.pem");
    shell("openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out " + plain +
          " 2>/dev/null");
    shell("PASS=secret openssl pkcs8 -topk8 -v2 aes256 -passout env:PASS -in " + plain + " -out " +
          locked);
    std::string pem = shell("openssl pkey -pubout -in " + plain);
    CHECK(RsaPrivateKey::load(dir.path / "plain.pem", {})->public_key().pem() == pem);
    CHECK(RsaPrivateKey::load(dir.path / "locked.pem", as_bytes("secret"))->public_key().pem() ==
          pem);
}

TEST_CASE("chapter 4: OAEP boxes go both ways between us and the openssl command") {
    TempDir dir;
    test_key(0).save(dir.path / "key.pem", {}, 0);
    write_text(dir.path / "public.pem", test_key(0).public_key().pem());
    Bytes label = bytes_of("a label");
    std::string options =
        " -pkeyopt rsa_padding_mode:oaep -pkeyopt rsa_oaep_md:sha256"
        " -pkeyopt rsa_mgf1_md:sha256 -pkeyopt rsa_oaep_label:" +
        to_hex(label);

    write_text(dir.path / "theirs.txt", std::string(32, 'T'));
    shell("openssl pkeyutl -encrypt -pubin -inkey " + quoted(dir.path / "public.pem") + " -in " +
          quoted(dir.path / "theirs.txt") + " -out " + quoted(dir.path / "theirs.box") + options);
    auto opened = test_key(0).decrypt(as_bytes(read_text(dir.path / "theirs.box")), label);
    REQUIRE(opened);
    CHECK(as_text(opened->view()) == std::string(32, 'T'));

    Bytes box = test_key(0).public_key().encrypt(secret_of('U'), label);
    write_text(dir.path / "ours.box", as_text(box));
    CHECK(shell("openssl pkeyutl -decrypt -inkey " + quoted(dir.path / "key.pem") + " -in " +
                quoted(dir.path / "ours.box") + options) == std::string(32, 'U'));
}

TEST_CASE("chapter 4: PSS signatures go both ways between us and the openssl command") {
    TempDir dir;
    test_key(0).save(dir.path / "key.pem", {}, 0);
    write_text(dir.path / "public.pem", test_key(0).public_key().pem());
    write_text(dir.path / "message", "signed by both");
    std::string options =
        " -sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:32"
        " -sigopt rsa_mgf1_md:sha256 ";

    shell("openssl dgst -sha256" + options + "-sign " + quoted(dir.path / "key.pem") + " -out " +
          quoted(dir.path / "theirs") + " " + quoted(dir.path / "message"));
    CHECK(test_key(0).public_key().verify(as_bytes("signed by both"),
                                          as_bytes(read_text(dir.path / "theirs"))));

    write_text(dir.path / "ours", as_text(test_key(0).sign(as_bytes("signed by both"))));
    CHECK(contains(
        shell("openssl dgst -sha256" + options + "-verify " + quoted(dir.path / "public.pem") +
              " -signature " + quoted(dir.path / "ours") + " " + quoted(dir.path / "message")),
        "Verified OK"));
}

TEST_CASE("chapter 4: a fingerprint of 31 bytes is none") {
    std::string text = "SHA256:" + to_base64(Bytes(31));  // 43 characters and one =
    CHECK(throws<Error>([&] { Fingerprint::parse(text.substr(0, 7 + 43)); }));
}

// ---- Chapter 5. The hop channel -----------------------------------------------------------------

namespace {

using Change = std::function<void(Bytes&)>;
using Network = std::function<void(int frame, Bytes& bytes)>;  // frames are 1, 2 and 3

Network changing(int which, Change change) {
    return [which, change](int frame, Bytes& bytes) {
        if (frame == which) change(bytes);
    };
}

struct Handshaken {
    Fingerprint shown;  // the key that the client saw
    HopKeys client, server;
    std::array<Bytes, 3> frames;  // as they arrived

    bool agree() const {
        return hex_of(client.client_to_server) == hex_of(server.client_to_server) &&
               hex_of(client.server_to_client) == hex_of(server.server_to_client) &&
               client.channel_binding == server.channel_binding;
    }
    // No key and no binding of one side is of use at the other.
    bool agree_in_nothing() const {
        return hex_of(client.client_to_server) != hex_of(server.client_to_server) &&
               hex_of(client.server_to_client) != hex_of(server.server_to_client) &&
               client.channel_binding != server.channel_binding;
    }
};

// A whole handshake over a network that may change what it carries.
Handshaken shake_hands(const Network& network = [](int, Bytes&) {}) {
    Handshaken result;
    auto carry = [&](int frame, ByteView bytes) {
        Bytes& arrived = result.frames.at(static_cast<std::size_t>(frame) - 1);
        arrived = to_bytes(bytes);
        network(frame, arrived);
        return ByteView(arrived);
    };
    ClientHandshake client;
    ServerHandshake server(test_key(0), carry(1, client.hello()));
    result.shown = client.receive_hello(carry(2, server.hello())).fingerprint();
    Bytes key = client.key_message(result.client);
    result.server = server.receive_key(carry(3, key));
    return result;
}

Bytes sealed_record(RecordSealer& sealer, std::string_view text) {
    Bytes record(frame_header_bytes);
    append(record, as_bytes(text));
    sealer.seal(record);
    return record;
}
// What the frame reader would hand out: the record without its length.
Bytes frame_content(const Bytes& record) {
    return to_bytes(ByteView(record).subspan(frame_header_bytes));
}
bool refuses(RecordOpener& opener, Bytes content) {
    return throws<ProtocolError>([&] { opener.open(content); });
}

}  // namespace

TEST_CASE("chapter 5: the handshake gives both sides the same keys") {
    Handshaken result = shake_hands();
    CHECK(result.shown == test_key(0).public_key().fingerprint());
    CHECK(result.agree());
    std::set<std::string> different{
        hex_of(result.client.client_to_server), hex_of(result.client.server_to_client),
        to_hex(result.client.channel_binding), hex_of(shake_hands().client.client_to_server)};
    CHECK(different.size() == 4);
}

TEST_CASE("chapter 5: the three frames look as the chapter says") {
    auto [shown, client, server, frames] = shake_hands();
    CHECK(frames[0].size() == 8 + 32);
    CHECK(as_text(ByteView(frames[0]).first(8)) == "CHATSEC1");
    CHECK(as_text(ByteView(frames[1]).first(8)) == "CHATSEC1");
    CHECK(to_bytes(ByteView(frames[1]).subspan(8 + 32)) == test_key(0).public_key().der());
    CHECK(frames[2].size() == 256);
    CHECK(std::max({frames[0].size(), frames[1].size(), frames[2].size()}) <= max_handshake_bytes);
}

TEST_CASE("chapter 5: the keys are computed as the chapter says") {
    // A client written from the description alone.
    X25519Key mine = X25519Key::generate();
    Bytes frame1 = join(as_bytes("CHATSEC1"), mine.public_key());
    ServerHandshake server(test_key(0), frame1);
    Bytes frame2 = to_bytes(server.hello());
    X25519Public theirs{};
    std::copy(frame2.begin() + 8, frame2.begin() + 40, theirs.begin());

    Bytes frame3 = test_key(0).public_key().encrypt(secret_of(7), sha256(join(frame1, frame2)));
    Secret<32> prk =
        agree(sha256(join(frame1, frame2, frame3)), secret_of(7), mine.shared_secret(theirs));
    HopKeys keys = server.receive_key(frame3);
    CHECK(hex_of(keys.client_to_server) ==
          hex_of(hkdf_expand(prk, "chatsecure hop client to server")));
    CHECK(hex_of(keys.server_to_client) ==
          hex_of(hkdf_expand(prk, "chatsecure hop server to client")));
    CHECK(to_hex(keys.channel_binding) ==
          hex_of(hkdf_expand(prk, "chatsecure hop channel binding")));
}

TEST_CASE("chapter 5: a bit changed in any frame is noticed, or leaves no key in common") {
    for (int frame : {1, 2, 3}) {
        const std::size_t size =
            shake_hands().frames.at(static_cast<std::size_t>(frame) - 1).size();
        for (std::size_t at = 0; at < size; at += frame == 1 ? 3 : 11) {
            CAPTURE(frame);
            CAPTURE(at);
            bool noticed = false;
            try {
                Handshaken result =
                    shake_hands(changing(frame, [at](Bytes& bytes) { bytes[at] ^= 1; }));
                noticed = result.shown != test_key(0).public_key().fingerprint() ||  // not the pin
                          result.agree_in_nothing();
            } catch (const Error&) {
                noticed = true;
            }
            CHECK(noticed);
        }
    }
}

TEST_CASE("chapter 5: a man in the middle with his own X25519 keys has no key in common") {
    // He knows both ephemeral secrets then, but not what is in the box, and the hashes differ.
    X25519Key his = X25519Key::generate();
    auto swap_key = [&](Bytes& hello) {
        std::copy(his.public_key().begin(), his.public_key().end(), hello.begin() + 8);
    };
    CHECK(shake_hands(changing(1, swap_key)).agree_in_nothing());
    CHECK(shake_hands(changing(2, swap_key)).agree_in_nothing());
    CHECK(shake_hands([&](int frame, Bytes& bytes) {
              if (frame < 3) swap_key(bytes);
          }).agree_in_nothing());
}

TEST_CASE("chapter 5: another version, or another program, is told so") {
    auto change = [](Bytes& hello) { hello[7] = '2'; };
    for (int frame : {1, 2})
        CHECK_THROWS_WITH_AS(shake_hands(changing(frame, change)),
                             "The other side does not speak this version of ChatSecure.",
                             ProtocolError);
    for (std::string_view hello : {"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n..........",
                                   "SSH-2.0-OpenSSH_9.6\r\n", "", "CHATSEC", "CHATSEC1"}) {
        CAPTURE(hello);
        CHECK(throws<ProtocolError>([&] { ServerHandshake(test_key(0), as_bytes(hello)); }));
        CHECK(throws<ProtocolError>([&] { ClientHandshake().receive_hello(as_bytes(hello)); }));
    }
}

TEST_CASE("chapter 5: a client hello has exactly its size") {
    auto shorter = [](Bytes& hello) { hello.pop_back(); };
    auto longer = [](Bytes& hello) { hello.push_back(0); };
    CHECK(throws<ProtocolError>([&] { shake_hands(changing(1, shorter)); }));
    CHECK(throws<ProtocolError>([&] { shake_hands(changing(1, longer)); }));
}

TEST_CASE("chapter 5: a server hello with a key that is none, or too weak, is refused") {
    for (const Bytes& der :
         {Bytes{}, bytes_of("garbage"), made_up_rsa_der(1024, 65537), made_up_rsa_der(2048, 3),
          made_up_rsa_der(4104, 65537), join(test_key(0).public_key().der(), Bytes(1))}) {
        auto replace = [&](Bytes& hello) {
            hello.resize(8 + 32);
            append(hello, der);
        };
        CHECK(throws<ProtocolError>([&] { shake_hands(changing(2, replace)); }));
    }
}

TEST_CASE("chapter 5: an X25519 key that makes the secret zero is refused on both sides") {
    auto zero = [](Bytes& hello) { std::fill(hello.begin() + 8, hello.begin() + 40, 0); };
    CHECK(throws<ProtocolError>([&] { shake_hands(changing(1, zero)); }));
    CHECK(throws<ProtocolError>([&] { shake_hands(changing(2, zero)); }));
}

TEST_CASE("chapter 5: a box that does not open is not reported: the keys are just other ones") {
    const Change bad_boxes[]{
        [](Bytes& box) { box[100] ^= 1; },
        [](Bytes& box) { box.clear(); },
        [](Bytes& box) { box.pop_back(); },
        [](Bytes& box) { box.push_back(0); },
        [](Bytes& box) { std::fill(box.begin(), box.end(), 0xff); },
        [](Bytes& box) { std::fill(box.begin(), box.end(), 0); },
        [](Bytes& box) { box = test_key(0).public_key().encrypt(secret_of(1), {}); },  // no label
    };
    for (const Change& change : bad_boxes)
        CHECK(shake_hands(changing(3, change)).agree_in_nothing());
}

TEST_CASE("chapter 5: a box recorded in one handshake is of no use in another") {
    Bytes recorded = shake_hands().frames[2];
    CHECK(shake_hands(changing(3, [&](Bytes& box) { box = recorded; })).agree_in_nothing());
}

TEST_CASE("chapter 5: records go through, one after the other, of every size") {
    RecordSealer sealer(secret_of(1));
    RecordOpener opener(secret_of(1));
    for (std::size_t size : {0U, 1U, 15U, 16U, 17U, 1000U, 65535U, 65536U}) {
        std::string text(size, 'x');
        Bytes record = sealed_record(sealer, text);
        CHECK(record.size() == frame_header_bytes + size + gcm_tag_bytes);
        CHECK(frame_length(record, max_record_frame) == size + gcm_tag_bytes);
        Bytes content = frame_content(record);
        CHECK(as_text(opener.open(content)) == text);
    }
}

TEST_CASE("chapter 5: a record over 64 KiB is not made") {
    RecordSealer sealer(secret_of(1));
    CHECK(throws<Error>([&] { sealed_record(sealer, std::string(65537, 'x')); }));
}

TEST_CASE("chapter 5: a record is AES-256-GCM with its number as nonce and its length as aad") {
    RecordSealer sealer(secret_of(1));
    for (std::uint64_t number = 0; number < 3; ++number)
        CHECK(frame_content(sealed_record(sealer, "hello")) ==
              gcm_seal(secret_of(1), number, from_hex("00000015"), as_bytes("hello")));
}

TEST_CASE("chapter 5: a record that was changed in any byte does not open") {
    RecordSealer sealer(secret_of(1));
    Bytes content = frame_content(sealed_record(sealer, "hello"));
    for (std::size_t at = 0; at < content.size(); ++at) {
        RecordOpener opener(secret_of(1));
        Bytes changed = content;
        changed[at] ^= 0x80;
        CHECK(refuses(opener, changed));
    }
}

TEST_CASE("chapter 5: a record that was cut or made longer does not open") {
    RecordSealer sealer(secret_of(1));
    Bytes content = frame_content(sealed_record(sealer, "hello"));
    for (std::size_t size = 0; size < content.size(); ++size) {
        RecordOpener opener(secret_of(1));
        CHECK(refuses(opener, to_bytes(ByteView(content).first(size))));
    }
    RecordOpener opener(secret_of(1));
    CHECK(refuses(opener, join(content, Bytes(1))));
}

TEST_CASE("chapter 5: a replayed, dropped, reordered or reflected record does not open") {
    RecordSealer sealer(secret_of(1));
    const Bytes first = frame_content(sealed_record(sealer, "first"));
    const Bytes second = frame_content(sealed_record(sealer, "second"));
    RecordOpener opener(secret_of(1));
    SUBCASE("replayed") {
        Bytes content = first;
        opener.open(content);
        CHECK(refuses(opener, first));
    }
    SUBCASE("dropped, or reordered") { CHECK(refuses(opener, second)); }
    SUBCASE("reflected: each direction has its own key") {
        Handshaken channel = shake_hands();
        RecordSealer client(std::move(channel.client.client_to_server));
        RecordOpener client_opener(std::move(channel.client.server_to_client));
        CHECK(refuses(client_opener, frame_content(sealed_record(client, "hello"))));
    }
}

TEST_CASE("chapter 5: nothing opens behind a bad record") {
    RecordSealer sealer(secret_of(1));
    const Bytes first = frame_content(sealed_record(sealer, "first"));
    RecordOpener opener(secret_of(1));
    Bytes bad = first;
    bad[0] ^= 1;
    CHECK(refuses(opener, bad));
    CHECK(refuses(opener, first));
}

TEST_CASE("chapter 5: after 2^20 records both sides move to the next key, together") {
    RecordSealer sealer(secret_of(1));
    RecordOpener opener(secret_of(1));
    Bytes record;
    std::uint64_t opened = 0;
    auto pass_one = [&] {
        record.assign(frame_header_bytes, 0);
        sealer.seal(record);
        opened += opener.open(ByteSpan(record).subspan(frame_header_bytes)).empty() ? 1 : 0;
    };
    for (std::uint64_t i = 0; i < records_per_key; ++i) pass_one();

    Secret<32> next = hkdf_expand(secret_of(1), "chatsecure hop next key");
    record.assign(frame_header_bytes, 0);
    sealer.seal(record);
    CHECK(frame_content(record) == gcm_seal(next, records_per_key, from_hex("00000010"), {}));
    CHECK(opener.open(ByteSpan(record).subspan(frame_header_bytes)).empty());
    for (int i = 0; i < 2; ++i) pass_one();
    CHECK(opened == records_per_key + 2);
}

TEST_CASE("chapter 5: a server key with an even modulus is a ProtocolError") {
    Bytes der = test_key(0).public_key().der();
    der[der.size() - 6] ^= 1;  // the last byte of the modulus, before 02 03 01 00 01
    CHECK(throws<ProtocolError>([&] {
        shake_hands(changing(2, [&](Bytes& hello) {
            hello.resize(8 + 32);
            append(hello, der);
        }));
    }));
}

// ---- Chapter 6. Passwords -----------------------------------------------------------------------

namespace {

ScramVerifier verifier_for(std::string_view password) {
    Bytes salt = bytes_of("a fixed salt 16b");
    return make_verifier(pbkdf2_sha256(as_bytes(password), salt, few_iterations), salt,
                         few_iterations);
}

// A login as it should be, message by message, for tests to spoil.
struct Login {
    Bytes binding = Bytes(32, 0xb1);
    ScramVerifier verifier = verifier_for("pencil case");
    ScramClient client{"alice", binding};
    ScramServer server{client.first(), binding};

    // client-final for the challenge of the server.
    std::string proof(std::string_view password = "pencil case") {
        auto [salt, iterations] = client.receive_challenge(server.challenge(verifier));
        return client.final(pbkdf2_sha256(as_bytes(password), salt, iterations));
    }
};

std::string replaced(std::string text, std::string_view from, std::string_view to) {
    return text.replace(text.find(from), from.size(), to);
}

}  // namespace

TEST_CASE("chapter 6: SCRAM-SHA-256, the example of RFC 7677 section 3") {
    ScramClient client("user", {}, "n,,", "rOprNGfwEbeRWgbNEkqO");
    CHECK(client.first() == "n,,n=user,r=rOprNGfwEbeRWgbNEkqO");

    ScramServer server(client.first(), {}, "n,,", "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0");
    CHECK(server.user() == "user");
    Bytes salt = from_base64("W22ZaJ0SNY7soEsUEjb6gQ==");
    Secret<32> salted = pbkdf2_sha256(as_bytes("pencil"), salt, 4096);
    std::string challenge = server.challenge(make_verifier(salted, salt, 4096));
    CHECK(challenge ==
          "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096");

    ScramClient::Challenge asked = client.receive_challenge(challenge);
    CHECK(asked.salt == salt);
    CHECK(asked.iterations == 4096);
    std::string proof = client.final(salted);
    CHECK(proof ==
          "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,"
          "p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=");

    std::optional<std::string> answer = server.check(proof);
    REQUIRE(answer);
    CHECK(*answer == "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=");
    CHECK_NOTHROW(client.verify_server(*answer));
}

TEST_CASE("chapter 6: a login with the right password, bound to its channel") {
    Login login;
    std::string proof = login.proof();
    CHECK(proof.starts_with("c=" + to_base64(join(as_bytes("p=chatsecure,,"), login.binding)) +
                            ",r="));
    std::optional<std::string> answer = login.server.check(proof);
    REQUIRE(answer);
    CHECK_NOTHROW(login.client.verify_server(*answer));
}

TEST_CASE("chapter 6: no two logins use the same nonces") {
    CHECK(ScramClient("alice", {}).first() != ScramClient("alice", {}).first());
    std::string first = ScramClient("alice", {}).first();
    ScramVerifier verifier = verifier_for("x");
    CHECK(ScramServer(first, {}).challenge(verifier) != ScramServer(first, {}).challenge(verifier));
}

TEST_CASE("chapter 6: a wrong password does not log in") {
    for (std::string_view wrong : {"pencil cas", "Pencil case", "pencil case ", ""}) {
        Login login;
        CHECK_FALSE(login.server.check(login.proof(wrong)));
    }
}

TEST_CASE("chapter 6: a login passed on from another channel does not log in") {
    // The man in the middle has two channels, each with its own binding.
    Login login;
    ScramServer server(login.client.first(), Bytes(32, 0xb2));
    auto [salt, iterations] = login.client.receive_challenge(server.challenge(login.verifier));
    std::string proof =
        login.client.final(pbkdf2_sha256(as_bytes("pencil case"), salt, iterations));
    CHECK_FALSE(server.check(proof));
    // To write the server's binding into the message does not help: the proof is over it.
    std::string ours = to_base64(join(as_bytes(scram_gs2_header), login.binding));
    std::string theirs = to_base64(join(as_bytes(scram_gs2_header), Bytes(32, 0xb2)));
    CHECK_FALSE(server.check(replaced(proof, ours, theirs)));
}

TEST_CASE("chapter 6: a changed proof does not log in, whatever was changed") {
    const std::function<std::string(std::string)> changes[]{
        [](std::string proof) { return replaced(proof, ",r=", ",r=x"); },
        [](std::string proof) { return replaced(proof, ",p=", "x,p="); },
        [](std::string proof) { return proof.substr(0, proof.find(",p=")) + ",p="; },
        [](std::string proof) { return proof.substr(0, proof.find(",p=")) + ",p=AAAA"; },
        [](std::string proof) { return proof.substr(0, proof.find(",p=")) + ",p=no base64"; },
        [](std::string proof) {
            return proof.substr(0, proof.find(",p=")) + ",p=" + to_base64(Bytes(32));
        },
        [](std::string proof) { return proof.substr(0, proof.find(",p=")); },
    };
    for (const auto& change : changes) {
        Login login;
        CHECK_FALSE(login.server.check(change(login.proof())));
    }
}

TEST_CASE("chapter 6: a recorded proof does not log in again") {
    Login first, second;
    std::string recorded = first.proof();
    second.proof();
    CHECK_FALSE(second.server.check(recorded));
}

TEST_CASE("chapter 6: what is stored does not log in") {
    // The thief of users.db has StoredKey where a client would have ClientKey (P7).
    Login login;
    std::string proof = login.proof();
    std::string_view left = proof;
    std::string_view without = left.substr(0, left.find(",p="));
    for (const Digest& stored : {login.verifier.stored_key, login.verifier.server_key})
        CHECK_FALSE(login.server.check(concat(without, ",p=", to_base64(stored))));
}

TEST_CASE("chapter 6: a client message that is no login is refused") {
    for (std::string_view first :
         {"", "n,,n=alice,r=0123456789abcdef", "y,,n=alice,r=0123456789abcdef", "p=chatsecure,,",
          "p=other,,n=alice,r=0123456789abcdef", "p=chatsecure,,n=alice", "p=chatsecure,,n=alice,",
          "p=chatsecure,,r=0123456789abcdef,n=alice", "p=chatsecure,,n=Alice,r=0123456789abcdef",
          "p=chatsecure,,n=,r=0123456789abcdef", "p=chatsecure,,n=alice,r=tooshort",
          "p=chatsecure,a=root,n=alice,r=0123456789abcdef"}) {
        CAPTURE(first);
        CHECK(throws<ProtocolError>([&] { ScramServer(first, {}); }));
    }
    CHECK(throws<ProtocolError>(
        [] { ScramServer("p=chatsecure,,n=alice,r=" + std::string(129, 'x'), {}); }));
    for (std::string_view final : {"", "c=", "r=x", "c=x,p=x"}) {
        CAPTURE(final);
        Login login;
        login.proof();
        CHECK(throws<ProtocolError>([&] { login.server.check(final); }));
    }
}

TEST_CASE("chapter 6: the client refuses a server that asks for something unsafe or strange") {
    ScramClient client("alice", {}, scram_gs2_header, "clientnonce");
    CHECK_NOTHROW(client.receive_challenge("r=clientnonceAndMore,s=AAAA,i=4096"));
    CHECK_NOTHROW(client.receive_challenge("r=clientnonceAndMore,s=AAAA,i=10000000"));
    for (std::string_view bad :
         {"r=clientnonceAndMore,s=AAAA,i=4095",  // too few: cheap to search
          "r=clientnonceAndMore,s=AAAA,i=1", "r=clientnonceAndMore,s=AAAA,i=0",
          "r=clientnonceAndMore,s=AAAA,i=-5000", "r=clientnonceAndMore,s=AAAA,i=",
          "r=clientnonceAndMore,s=AAAA,i=10000001",  // too many: an attack on the client
          "r=clientnonceAndMore,s=AAAA,i=99999999999999999999",
          "r=clientnonce,s=AAAA,i=4096",        // the server added nothing
          "r=othernonceAndMore,s=AAAA,i=4096",  // the answer to somebody else
          "r=,s=AAAA,i=4096", "r=clientnonceAndMore,s=,i=4096",
          "r=clientnonceAndMore,s=A,i=4096",  // no base64
          "r=clientnonceAndMore,i=4096,s=AAAA", "r=clientnonceAndMore,s=AAAA",
          "m=ext,r=clientnonceAndMore,s=AAAA,i=4096",  // an extension that we do not know
          "e=unknown-user", "", ","}) {
        CAPTURE(bad);
        CHECK(throws<ProtocolError>([&] { client.receive_challenge(bad); }));
    }
}

TEST_CASE("chapter 6: a server that does not know the account cannot pretend") {
    Login login;
    std::string proof = login.proof();
    for (std::string_view fake : {"", "v=", "v=AAAA", "e=other-error"})
        CHECK(throws<ProtocolError>([&] { login.client.verify_server(fake); }));
    CHECK(throws<ProtocolError>([&] { login.client.verify_server("v=" + to_base64(Bytes(32))); }));
    // It may know everything but ServerKey.
    ScramVerifier without_key = login.verifier;
    without_key.server_key = {};
    ScramServer fake(login.client.first(), login.binding, scram_gs2_header, "fixed nonce");
    auto [salt, iterations] = login.client.receive_challenge(fake.challenge(without_key));
    std::optional<std::string> answer =
        fake.check(login.client.final(pbkdf2_sha256(as_bytes("pencil case"), salt, iterations)));
    REQUIRE(answer);
    CHECK(throws<ProtocolError>([&] { login.client.verify_server(*answer); }));
}

TEST_CASE("chapter 6: the stored form is PostgreSQL's, computed here by the openssl command") {
    std::string password = "correct horse";
    Bytes salt = bytes_of("0123456789abcdef");
    auto mac = [](const std::string& hex_key, const std::string& text) {
        return word_of("printf '%s' '" + text +
                       "' | openssl dgst -sha256 -r -mac HMAC -macopt hexkey:" + hex_key);
    };
    std::string salted =
        shell("openssl kdf -keylen 32 -kdfopt digest:SHA256 -kdfopt 'pass:" + password +
              "' -kdfopt hexsalt:" + to_hex(salt) + " -kdfopt iter:4096 PBKDF2");
    std::erase_if(salted, [](char c) { return c == ':' || c == '\n'; });
    std::string client_key = mac(salted, "Client Key"), server_key = mac(salted, "Server Key");
    std::string stored_key = to_hex(sha256(from_hex(client_key)));

    ScramVerifier verifier =
        make_verifier(pbkdf2_sha256(as_bytes(password), salt, 4096), salt, 4096);
    CHECK(verifier.text() == "SCRAM-SHA-256$4096:" + to_base64(salt) + "$" +
                                 to_base64(from_hex(stored_key)) + ":" +
                                 to_base64(from_hex(server_key)));
    CHECK(ScramVerifier::parse(verifier.text()).text() == verifier.text());
}

TEST_CASE("chapter 6: passwords that nobody should have are refused") {
    for (std::string_view good : {"12345678", "correct horse battery",
                                  "\xc3\xa4\xc3\xb6\xc3\xbc\xc3\x9f"
                                  "1234"})
        CHECK_NOTHROW(check_new_password(as_bytes(good)));
    for (std::string_view bad : {"", "1234567", "\xc3\xa4\xc3\xb6\xc3\xbc\xc3\x9f",  // 4 characters
                                 "tab\tinside", "line\ninside", "not UTF-8 \xff", "delete \x7f.."})
        CHECK(throws<Error>([&] { check_new_password(as_bytes(bad)); }));
    CHECK_NOTHROW(check_new_password(Bytes(1024, 'x')));
    CHECK(throws<Error>([] { check_new_password(Bytes(1025, 'x')); }));
}

TEST_CASE("chapter 6: a password comes from the first line of a file, or from the environment") {
    TempDir dir;
    for (std::string_view content :
         {"pass word", "pass word\n", "pass word\r\n", "pass word\nmore"}) {
        write_text(dir.path / "password", content);
        CHECK(as_text(*find_password(dir.path / "password")) == "pass word");
    }
    CHECK(contains(complaint([&] { find_password(dir.path / "none"); }), "no password file"));

    ::setenv("CHATSECURE_PASSWORD", "from outside", 1);
    CHECK(as_text(*find_password({})) == "from outside");
    CHECK(std::getenv("CHATSECURE_PASSWORD") == nullptr);  // programs that we start do not get it
    CHECK_FALSE(find_password({}));
}

namespace {

Account account_of(const std::string& user) {
    return {user, verifier_for(user + "'s password"), {}, "2026-11-23T09:41:00Z"};
}

}  // namespace

TEST_CASE("chapter 6: accounts are there again after a restart") {
    TempDir dir;
    std::filesystem::path path = dir.path / "users.db";
    {
        AuthStore store(path);
        CHECK(store.size() == 0);
        CHECK(store.add(account_of("alice")));
        CHECK(store.add(account_of("bob")));
        CHECK_FALSE(store.add(account_of("alice")));  // taken
        store.set_identity("bob", as_bytes("bob's key"));
        CHECK(mode_of(path) == owner_read_write);
    }
    AuthStore store(path);
    CHECK(store.size() == 2);
    CHECK(store.find("alice")->line() == account_of("alice").line());
    CHECK(store.find("alice")->identity.empty());
    CHECK(as_text(store.find("bob")->identity) == "bob's key");
    CHECK_FALSE(store.find("carol"));
}

TEST_CASE("chapter 6: users.db keeps its comments, its order and its empty lines") {
    TempDir dir;
    std::filesystem::path path = dir.path / "users.db";
    std::string alice = account_of("alice").line(), bob = account_of("bob").line();
    write_text(path, "# Our accounts\n\n" + alice + "\n  # and below\n" + bob);  // no end of line
    AuthStore store(path);
    CHECK(store.size() == 2);
    store.set_identity("alice", as_bytes("key"));
    store.add(account_of("carol"));
    Account changed = account_of("alice");
    changed.identity = bytes_of("key");
    CHECK(read_text(path) == "# Our accounts\n\n" + changed.line() + "\n  # and below\n" + bob +
                                 "\n" + account_of("carol").line() + "\n");
}

TEST_CASE("chapter 6: users.db edited on Windows is read") {
    TempDir dir;
    std::filesystem::path path = dir.path / "users.db";
    write_text(path, "# Our accounts\r\n\r\n" + account_of("alice").line() + "\r\n");
    CHECK(AuthStore(path).find("alice"));
}

TEST_CASE("chapter 6: a line of users.db that is not understood is named, and nothing is guessed") {
    TempDir dir;
    std::filesystem::path path = dir.path / "users.db";
    const std::string key = to_base64(Bytes(32)), salt = to_base64(Bytes(16));
    const std::string entry = "SCRAM-SHA-256$4096:" + salt + "$" + key + ":" + key;
    const std::string time = " - 2026-11-23T09:41:00Z";
    CHECK_NOTHROW(Account::parse("bob " + entry + time));
    const std::string bad_lines[]{
        "bob",
        "bob " + entry,
        "bob " + entry + " -",
        "bob " + entry + time + " more",
        "Bob " + entry + time,
        "b/b " + entry + time,
        std::string(33, 'b') + " " + entry + time,
        "bob plain-text-password" + time,
        "bob md5$" + entry.substr(14) + time,
        "bob SCRAM-SHA-256$4095:" + salt + "$" + key + ":" + key + time,
        "bob SCRAM-SHA-256$10000001:" + salt + "$" + key + ":" + key + time,
        "bob SCRAM-SHA-256$4096x:" + salt + "$" + key + ":" + key + time,
        "bob SCRAM-SHA-256$:" + salt + "$" + key + ":" + key + time,
        "bob SCRAM-SHA-256$4096:$" + key + ":" + key + time,
        "bob SCRAM-SHA-256$4096:" + to_base64(Bytes(65)) + "$" + key + ":" + key + time,
        "bob SCRAM-SHA-256$4096:*$" + key + ":" + key + time,
        "bob SCRAM-SHA-256$4096:" + salt + "$" + key + time,
        "bob SCRAM-SHA-256$4096:" + salt + "$" + key + ":" + salt + time,
        "bob SCRAM-SHA-256$4096:" + salt + "$" + salt + ":" + key + time,
        "bob " + entry + " no*base64 2026-11-23T09:41:00Z",
        account_of("alice").line(),  // alice twice
    };
    for (const std::string& bad : bad_lines) {
        CAPTURE(bad);
        std::string content = account_of("alice").line() + "\n\n" + bad + "\n";
        write_text(path, content);
        CHECK(contains(complaint([&] { AuthStore{path}; }), "users.db, line 3: "));
        CHECK(read_text(path) == content);
    }
}

TEST_CASE("chapter 6: users.db that another program changed is not overwritten") {
    TempDir dir;
    std::filesystem::path path = dir.path / "users.db";
    AuthStore store(path);
    store.add(account_of("alice"));
    std::string edited = read_text(path) + account_of("bob").line() + "\n";
    SUBCASE("edited") { write_text(path, edited); }
    SUBCASE("removed") {
        std::filesystem::remove(path);
        edited = "";
    }
    CHECK(contains(complaint([&] { store.add(account_of("carol")); }),
                   "was changed by another program"));
    CHECK(contains(complaint([&] { store.set_identity("alice", as_bytes("key")); }),
                   "was changed by another program"));
    CHECK(read_text(path) == edited);
    CHECK_FALSE(store.find("carol"));
    CHECK(store.find("alice")->identity.empty());
}

TEST_CASE("chapter 6: an account that cannot be written is none") {
    TempDir dir;
    AuthStore store(dir.path / "missing" / "users.db");
    CHECK(throws<Error>([&] { store.add(account_of("alice")); }));
    CHECK_FALSE(store.find("alice"));
    CHECK(store.size() == 0);
    // When the trouble is over, all is as if nothing had happened.
    std::filesystem::create_directory(dir.path / "missing");
    CHECK(store.add(account_of("alice")));
    CHECK(AuthStore(dir.path / "missing" / "users.db").size() == 1);
}

TEST_CASE("chapter 6: accounts with a public example password are found") {
    TempDir dir;
    AuthStore store(dir.path / "users.db");
    Account example = account_of("alice");
    example.verifier.salt = bytes_of(example_salt);
    store.add(example);
    store.add(account_of("bob"));
    CHECK(store.users_with_example_password() == std::vector<std::string>{"alice"});
}

TEST_CASE("chapter 6: many threads may use the accounts at once") {
    TempDir dir;
    std::filesystem::path path = dir.path / "users.db";
    AuthStore store(path);
    const Account pattern = account_of("pattern");
    std::vector<std::thread> threads;
    std::atomic<int> added = 0;
    for (int t = 0; t < 4; ++t)
        threads.emplace_back([&] {
            for (int i = 0; i < 5; ++i) {  // all want the same five names
                Account account = pattern;
                account.user = concat("user", i);
                added += store.add(account) ? 1 : 0;
            }
        });
    for (std::thread& thread : threads) thread.join();
    CHECK(added == 5);
    CHECK(AuthStore(path).size() == 5);
}

TEST_CASE("chapter 6: guessing becomes slow: three free tries, then twice as long each time") {
    LoginThrottle throttle;
    const Clock::time_point now = Clock::time_point{} + std::chrono::hours(1);
    for (int delay : {0, 0, 0, 250, 500, 1000, 2000, 4000, 4000, 4000}) {
        CHECK(throttle.delay("alice", "10.0.0.1", now) == Milliseconds(delay));
        throttle.failed("alice", "10.0.0.1", now);
    }
    for (int i = 0; i < 1000; ++i) throttle.failed("alice", "10.0.0.1", now);
    CHECK(throttle.delay("alice", "10.0.0.1", now) == Milliseconds(4000));
}

TEST_CASE("chapter 6: guessing is slow for the account and for the address, and is forgotten") {
    LoginThrottle throttle;
    const Clock::time_point now = Clock::time_point{} + std::chrono::hours(1);
    for (int i = 0; i < 3; ++i) throttle.failed("alice", "10.0.0.1", now);
    CHECK(throttle.delay("alice", "10.0.0.2", now) == Milliseconds(250));
    CHECK(throttle.delay("bob", "10.0.0.1", now) == Milliseconds(250));
    CHECK(throttle.delay("bob", "10.0.0.2", now) == Milliseconds(0));

    throttle.succeeded("alice");  // clears her, not the address
    CHECK(throttle.delay("alice", "10.0.0.2", now) == Milliseconds(0));
    CHECK(throttle.delay("alice", "10.0.0.1", now) == Milliseconds(250));

    auto soon = now + std::chrono::minutes(15), later = soon + Milliseconds(1);
    CHECK(throttle.delay("bob", "10.0.0.1", soon) == Milliseconds(250));
    CHECK(throttle.delay("bob", "10.0.0.1", later) == Milliseconds(0));
    throttle.failed("bob", "10.0.0.1", later);  // counts from the beginning again
    CHECK(throttle.delay("bob", "10.0.0.1", later) == Milliseconds(0));
}

// ---- Chapter 7. Messages ------------------------------------------------------------------------

namespace {

// Checks one message against its bytes, reads it back, and damages it in every way.
template <class T>
void check_message(const T& message, const std::string& body_hex) {
    Bytes body = from_hex(body_hex);
    Bytes wire = to_wire(message);
    CAPTURE(to_hex(wire));
    CHECK(wire == join(std::array{static_cast<std::uint8_t>(T::type)}, make_frame(body)));

    Reader record(wire, "a record");
    Message taken = take_message(record);
    CHECK(record.empty());
    CHECK(taken.type == T::type);
    CHECK(to_bytes(taken.body) == body);
    CHECK(encode(from_wire<T>(taken.body)) == body);

    for (std::size_t size = 0; size < wire.size(); ++size) {
        Reader cut(ByteView(wire).first(size), "a record");
        CHECK(throws<ProtocolError>([&] { take_message(cut); }));
    }
    for (std::size_t size = 0; size < body.size(); ++size)
        CHECK(throws<ProtocolError>([&] { from_wire<T>(ByteView(body).first(size)); }));
    CHECK(throws<ProtocolError>([&] { from_wire<T>(join(body, Bytes(1))); }));
}

const Bytes two_bytes{0xaa, 0xbb}, three_bytes{0x11, 0x22, 0x33};

Lid lid_of(std::uint8_t fill) {
    Lid lid;
    lid.fill(fill);
    return lid;
}

// What arrives when an outbox is written to a connection: the records, and the messages in them.
struct Arrived {
    std::vector<Bytes> records;
    std::vector<std::pair<MessageType, Bytes>> messages;
};
Arrived write_and_read(Outbox& outbox) {
    auto [out, in] = socket_pair();
    std::thread writer([&outbox, &out = out] {
        RecordSealer sealer(secret_of(1));
        outbox.write_to(out, sealer);
        out.finish_writing();
    });
    FrameReader frames(in, max_record_frame);
    MessageReader reader(frames, secret_of(1));
    Arrived arrived;
    while (std::optional<ByteView> record = reader.next_record()) {
        arrived.records.push_back(to_bytes(*record));
        for (Reader left(*record, "a record"); !left.empty();) {
            Message message = take_message(left);
            arrived.messages.emplace_back(message.type, to_bytes(message.body));
        }
    }
    writer.join();
    return arrived;
}

// A payload of this size on the wire, which begins with its number.
Outgoing payload_of(std::size_t wire_size, std::uint8_t number = 0) {
    Bytes payload(wire_size - message_header_bytes - 4 - 1 - 4, 0);
    if (!payload.empty()) payload[0] = number;
    Delivered message{LoginId{1}, Lane::interactive, payload};
    return {std::make_shared<const Bytes>(to_wire(message)), {}, 0};
}
std::uint8_t number_of(const Bytes& delivered) {
    return from_wire<Delivered>(delivered).payload[0];
}

}  // namespace

TEST_CASE("chapter 7: messages of the server: their bytes, and every way to cut them") {
    check_message(Welcome{"0.1", 1},
                  "0003302e31"
                  "01");
    check_message(Refused{RefusalReason::name_taken, "no"},
                  "02"
                  "00026e6f");
    check_message(Goodbye{"bye"}, "0003627965");
}

TEST_CASE("chapter 7: messages of both sides: their bytes, and every way to cut them") {
    check_message(Ping{0x0102030405060708}, "0102030405060708");
    check_message(Pong{7}, "0000000000000007");
    check_message(Quit{}, "");
}

TEST_CASE("chapter 7: messages of the login: their bytes, and every way to cut them") {
    check_message(RegisterAccount{"al", "v", two_bytes},
                  "0002616c"
                  "000176"
                  "00000002aabb");
    check_message(Registered{}, "");
    check_message(LoginStart{"a,b"}, "0003612c62");
    check_message(LoginChallenge{"a,b"}, "0003612c62");
    check_message(LoginProof{"a,b"}, "0003612c62");
    check_message(LoginDone{"v=", LoginId{0x01020304}},
                  "0002763d"
                  "01020304");
}

TEST_CASE("chapter 7: messages about who is here: their bytes, and every way to cut them") {
    check_message(PublishCard{two_bytes}, "00000002aabb");
    check_message(Joined{LoginId{9}, "bob"},
                  "00000009"
                  "0003626f62");
    check_message(Ready{}, "");
    check_message(Left{LoginId{9}}, "00000009");
    check_message(GetCard{LoginId{9}}, "00000009");
    check_message(CardOf{LoginId{9}, two_bytes},
                  "00000009"
                  "00000002aabb");
}

TEST_CASE("chapter 7: messages with payloads: their bytes, and every way to cut them") {
    check_message(Send{LoginId{9}, Lane::bulk, 5, two_bytes},
                  "00000009"
                  "01"
                  "00000005"
                  "00000002aabb");
    check_message(Delivered{LoginId{9}, Lane::interactive, two_bytes},
                  "00000009"
                  "00"
                  "00000002aabb");
    check_message(Fanout{5, two_bytes, three_bytes},
                  "00000005"
                  "00000002aabb"
                  "00000003112233");
    check_message(RoomDelivered{LoginId{9}, two_bytes, lid_of(0xcc)},
                  "00000009"
                  "00000002aabb" +
                      to_hex(Bytes(57, 0xcc)));
    check_message(Undelivered{LoginId{9}, 5, UndeliveredReason::busy},
                  "00000009"
                  "00000005"
                  "02");
}

TEST_CASE("chapter 7: a message that claims to be longer than its record is refused") {
    Bytes wire = from_hex(
        "04"
        "ffffffff"
        "0000");
    Reader record(wire, "a record");
    CHECK(throws<ProtocolError>([&] { take_message(record); }));
}

TEST_CASE("chapter 7: what was queued arrives, in its order, in one record") {
    Outbox outbox(1 << 20);
    for (std::uint64_t number = 0; number < 100; ++number)
        CHECK(outbox.push_control(Ping{number}) == Outbox::Result::queued);
    outbox.finish();
    Arrived arrived = write_and_read(outbox);
    CHECK(arrived.records.size() == 1);  // one encryption and one system call for all of them
    REQUIRE(arrived.messages.size() == 100);
    for (std::uint64_t number = 0; number < 100; ++number) {
        CHECK(arrived.messages[number].first == MessageType::ping);
        CHECK(from_wire<Ping>(arrived.messages[number].second).number == number);
    }
}

TEST_CASE("chapter 7: messages that do not fit into one record go into several") {
    Outbox outbox(1 << 20);
    for (std::uint8_t number = 0; number < 10; ++number)
        outbox.push(Lane::interactive, payload_of(20'000, number));
    outbox.finish();
    Arrived arrived = write_and_read(outbox);
    CHECK(arrived.records.size() == 4);  // three, three, three, one
    REQUIRE(arrived.messages.size() == 10);
    for (std::uint8_t number = 0; number < 10; ++number)
        CHECK(number_of(arrived.messages[number].second) == number);
}

TEST_CASE("chapter 7: a message may fill a record, and may not be larger") {
    Outbox outbox(1 << 20);
    CHECK(outbox.push(Lane::interactive, payload_of(max_record_bytes)) == Outbox::Result::queued);
    CHECK(throws<Error>([&] { outbox.push(Lane::interactive, payload_of(max_record_bytes + 1)); }));
    outbox.finish();
    CHECK(write_and_read(outbox).records.at(0).size() == max_record_bytes);
}

TEST_CASE("chapter 7: the part that all share and the own lid arrive as one message") {
    Bytes whole = to_wire(RoomDelivered{LoginId{1}, two_bytes, lid_of(0)});
    whole.resize(whole.size() - lid_bytes);
    auto shared = std::make_shared<const Bytes>(whole);
    Outbox outbox(1 << 20);
    for (std::uint8_t fill : Bytes{1, 2})
        outbox.push(Lane::interactive, {shared, lid_of(fill), lid_bytes});
    outbox.finish();
    Arrived arrived = write_and_read(outbox);
    REQUIRE(arrived.messages.size() == 2);
    CHECK(from_wire<RoomDelivered>(arrived.messages[0].second).lid == lid_of(1));
    CHECK(from_wire<RoomDelivered>(arrived.messages[1].second).lid == lid_of(2));
    CHECK(shared.use_count() == 1);  // the outbox has let go of it
}

TEST_CASE("chapter 7: chat overtakes file data") {
    Outbox outbox(1 << 20);
    for (std::uint8_t number : Bytes{10, 11, 12})
        outbox.push(Lane::bulk, payload_of(60'000, number));
    for (std::uint8_t number : Bytes{1, 2})
        outbox.push(Lane::interactive, payload_of(50'000, number));
    outbox.push_control(Ping{3});
    outbox.finish();
    std::vector<int> order;
    for (const auto& [type, body] : write_and_read(outbox).messages)
        order.push_back(type == MessageType::ping ? 3 : number_of(body));
    CHECK(order == std::vector<int>{1, 2, 3, 10, 11, 12});
}

TEST_CASE("chapter 7: payloads over the bound are refused, and fit again when there is room") {
    Outbox outbox(1000);
    CHECK(outbox.push(Lane::interactive, payload_of(700)) == Outbox::Result::queued);
    CHECK(outbox.push(Lane::interactive, payload_of(700)) == Outbox::Result::refused);
    CHECK(outbox.push(Lane::bulk, payload_of(700)) == Outbox::Result::refused);
    CHECK(outbox.is_over(699));
    CHECK_FALSE(outbox.is_over(1000));
    CHECK_FALSE(outbox.is_closed());

    auto [out, in] = socket_pair();
    RecordSealer sealer(secret_of(1));
    Outbox::Result again = Outbox::Result::refused;
    outbox.write_to(out, sealer, [&] {  // called when there is room
        again = outbox.push(Lane::interactive, payload_of(700));
        outbox.close();
    });
    CHECK(again == Outbox::Result::queued);
}

TEST_CASE("chapter 7: many small messages are bounded too: each costs more than its bytes") {
    Outbox outbox(10'000);
    int queued = 0;
    while (queued < 10'000 &&
           outbox.push(Lane::interactive, payload_of(14)) == Outbox::Result::queued)
        ++queued;
    CHECK(queued > 10);
    CHECK(queued < 10'000 / 14);
}

TEST_CASE("chapter 7: control messages may go over the bound, up to twice, and then all is over") {
    Outbox outbox(1000);
    CHECK(outbox.push(Lane::interactive, payload_of(900)) == Outbox::Result::queued);
    CHECK(outbox.push(Lane::interactive, payload_of(200)) == Outbox::Result::refused);
    int queued = 0;
    Outbox::Result last = outbox.push_control(Ping{});
    for (; last == Outbox::Result::queued && queued < 1000; ++queued)
        last = outbox.push_control(Ping{});
    CHECK(queued > 1);
    CHECK(last == Outbox::Result::refused);
    CHECK(outbox.is_closed());
    CHECK(outbox.push_control(Ping{}) == Outbox::Result::closed);
    CHECK(write_and_read(outbox).messages.empty());
}

TEST_CASE("chapter 7: a finished outbox takes nothing more and writes what it has") {
    Outbox outbox(1000);
    outbox.push_control(Ping{1});
    outbox.finish();
    CHECK(outbox.push_control(Ping{2}) == Outbox::Result::closed);
    CHECK(outbox.push(Lane::bulk, payload_of(20)) == Outbox::Result::closed);
    CHECK_FALSE(outbox.is_closed());
    CHECK(write_and_read(outbox).messages.size() == 1);
}

TEST_CASE("chapter 7: a closed outbox writes nothing, and closing wakes its writer") {
    Outbox outbox(1000);
    auto [out, in] = socket_pair();
    std::thread writer([&outbox, &out = out] {
        RecordSealer sealer(secret_of(1));
        outbox.write_to(out, sealer);
    });
    outbox.close();
    writer.join();
    outbox.finish();  // does not open it again
    CHECK(outbox.is_closed());
}

TEST_CASE("chapter 7: a writing thread keeps up with pushes from several threads") {
    Outbox outbox(16 << 20);
    std::vector<std::thread> pushers;
    for (std::uint64_t pusher = 0; pusher < 4; ++pusher)
        pushers.emplace_back([&outbox, pusher] {
            for (std::uint64_t i = 0; i < 1000; ++i) outbox.push_control(Ping{pusher << 32 | i});
        });
    std::thread closer([&] {
        for (std::thread& pusher : pushers) pusher.join();
        outbox.finish();
    });
    Arrived arrived = write_and_read(outbox);
    closer.join();
    CHECK(arrived.messages.size() == 4000);
    std::array<std::uint64_t, 4> expected{};  // each pusher's order is kept
    bool in_order = true;
    for (const auto& [type, body] : arrived.messages) {
        std::uint64_t number = from_wire<Ping>(body).number;
        in_order = in_order && expected.at(number >> 32)++ == (number & 0xffffffff);
    }
    CHECK(in_order);
}

TEST_CASE("chapter 7: a reader hands out messages one by one, whatever record they came in") {
    auto [out, in] = socket_pair();
    RecordSealer sealer(secret_of(1));
    send_now(out, sealer, Ping{1});
    Bytes record(frame_header_bytes);
    append(record, to_wire(Ping{2}));
    append(record, to_wire(Goodbye{"bye"}));
    sealer.seal(record);
    out.write_all(record);
    record.assign(frame_header_bytes, 0);
    sealer.seal(record);  // empty: whoever sends such records for ever would be served for ever
    out.write_all(record);
    out.finish_writing();

    FrameReader frames(in, max_record_frame);
    MessageReader reader(frames, secret_of(1));
    CHECK(from_wire<Ping>(reader.next()->body).number == 1);
    CHECK(from_wire<Ping>(reader.next()->body).number == 2);
    CHECK(from_wire<Goodbye>(reader.next()->body).sentence == "bye");
    CHECK_THROWS_AS(reader.next(), ProtocolError);
}

TEST_CASE("chapter 7: no message comes out of a record that is damaged") {
    auto [out, in] = socket_pair();
    RecordSealer sealer(secret_of(1));
    Bytes record(frame_header_bytes);
    append(record, to_wire(Ping{1}));
    sealer.seal(record);
    record.back() ^= 1;
    out.write_all(record);
    FrameReader frames(in, max_record_frame);
    MessageReader reader(frames, secret_of(1));
    CHECK(throws<ProtocolError>([&] { reader.next(); }));
}

// ---- Chapter 8. End to end ----------------------------------------------------------------------

namespace {

using State = OpenedPayload::State;

// Alice has opened to bob, over a server that passes on everything.
struct Conversation {
    LoginKeys alice{test_key(0), "alice", 1000};
    LoginKeys bob{test_key(1), "bob", 2000};
    CheckedCard alice_card{alice.card_bytes(), "alice"};
    CheckedCard bob_card{bob.card_bytes(), "bob"};
    Bytes open;
    PairSender sender{alice, bob_card, open};
    PairReceiver receiver{bob, alice_card, box()};

    OpenPayload opened() const {
        return decode<OpenPayload>(ByteView(open).subspan(1), "somebody's keys");
    }
    ByteView box() const { return opened().box; }

    // A sealed payload without its type, as the receiver wants it.
    Bytes seal(std::string_view text, Lane lane = Lane::interactive) {
        Bytes payload = sender.seal(lane, Kind::text, as_bytes(text));
        CHECK(payload[0] == static_cast<std::uint8_t>(PayloadType::sealed));
        return to_bytes(ByteView(payload).subspan(1));
    }
    OpenedPayload receive(ByteView sealed, Lane lane = Lane::interactive) {
        return receiver.open(lane, sealed);
    }
};

bool is_text(const OpenedPayload& payload, std::string_view text, std::uint64_t lost = 0) {
    return payload.state == State::good && payload.kind == Kind::text &&
           as_text(payload.body) == text && payload.lost == lost;
}

CheckedCard card_of(const std::string& user, int key, std::uint64_t issued) {
    return CheckedCard(LoginKeys(test_key(key), user, issued).card_bytes(), user);
}
const Fingerprint& fingerprint_of(int key) {
    static const std::array<Fingerprint, 3> all{test_key(0).public_key().fingerprint(),
                                                test_key(1).public_key().fingerprint(),
                                                test_key(2).public_key().fingerprint()};
    return all.at(static_cast<std::size_t>(key));
}

}  // namespace

TEST_CASE("chapter 8: a card says whose it is, and proves it") {
    LoginKeys keys(test_key(0), "alice", 1234567);
    CheckedCard card(keys.card_bytes(), "alice");
    CHECK(card.user() == "alice");
    CHECK(card.identity().der() == test_key(0).public_key().der());
    CHECK(card.fingerprint() == test_key(0).public_key().fingerprint());
    CHECK(card.ephemeral() == keys.ephemeral().public_key());
    CHECK(card.issued() == 1234567);
    CHECK(card.hash() == keys.card_hash());
    CHECK(keys.card_bytes().size() <= max_card_bytes);
}

TEST_CASE("chapter 8: a card has the bytes that the chapter says") {
    LoginKeys keys(test_key(0), "alice", 5);
    Bytes expected;
    append_fields(expected, std::string("alice"), test_key(0).public_key().der(),
                  keys.ephemeral().public_key(), std::uint64_t{5});
    CHECK(to_bytes(ByteView(keys.card_bytes()).first(expected.size())) == expected);
    Bytes signature = to_bytes(ByteView(keys.card_bytes()).subspan(expected.size() + 4));
    CHECK(
        test_key(0).public_key().verify(join(as_bytes("chatsecure card 1"), expected), signature));
}

TEST_CASE("chapter 8: a card with a changed byte, anywhere, is refused") {
    const Bytes good = LoginKeys(test_key(0), "alice", 5).card_bytes();
    for (std::size_t at = 0; at < good.size(); ++at) {
        Bytes bad = good;
        bad[at] ^= static_cast<std::uint8_t>(1 << at % 8);
        if (!throws<ProtocolError>([&] { CheckedCard(bad, "alice"); }))
            FAIL_CHECK("a card passes with another byte ", at);
    }
}

TEST_CASE("chapter 8: a card that was cut or made longer is refused") {
    const Bytes good = LoginKeys(test_key(0), "alice", 5).card_bytes();
    for (std::size_t size = 0; size < good.size(); ++size)
        if (!throws<ProtocolError>([&] { CheckedCard(ByteView(good).first(size), "alice"); }))
            FAIL_CHECK("a card passes with ", size, " bytes");
    CHECK(throws<ProtocolError>([&] { CheckedCard(join(good, Bytes(1)), "alice"); }));
    CHECK(throws<ProtocolError>([&] { CheckedCard(join(good, Bytes(3000)), "alice"); }));
}

TEST_CASE("chapter 8: a card is for its own name and with its own signature") {
    LoginKeys alice(test_key(0), "alice", 5), bob(test_key(1), "bob", 5);
    CHECK(throws<ProtocolError>([&] { CheckedCard(alice.card_bytes(), "bob"); }));

    Card card = decode<Card>(alice.card_bytes(), "a card");
    card.signature = decode<Card>(bob.card_bytes(), "a card").signature;
    CHECK(throws<ProtocolError>([&] { CheckedCard(encode(card), "alice"); }));

    // The server puts its own identity on it: then it is a valid card of another identity, which
    // the pins notice. With alice's identity it cannot sign.
    card.signature = test_key(1).sign(card.signed_part());
    CHECK(throws<ProtocolError>([&] { CheckedCard(encode(card), "alice"); }));
}

TEST_CASE("chapter 8: a card with a weak identity key is refused, although it is signed well") {
    RsaPrivateKey weak = RsaPrivateKey::generate(1024);
    LoginKeys keys(weak, "alice", 5);
    CHECK(throws<ProtocolError>([&] { CheckedCard(keys.card_bytes(), "alice"); }));
}

TEST_CASE("chapter 8: texts arrive in their order") {
    Conversation c;
    for (std::string_view text : {"hello", "", "two\nlines",
                                  "Gr\xc3\xbc\xc3\x9f"
                                  "e"})
        CHECK(is_text(c.receive(c.seal(text)), text));
    std::string longest(max_text_bytes, 'x');
    CHECK(is_text(c.receive(c.seal(longest)), longest));
}

TEST_CASE("chapter 8: a sealed payload is seq, then AES-256-GCM over kind and body") {
    SealingLane lane(secret_of(1));
    for (std::uint64_t seq : {1U, 2U, 3U}) {
        Bytes expected;
        append_fields(expected, seq);
        append(expected, gcm_seal(secret_of(1), seq, as_bytes("aad"), as_bytes("\x01hello")));
        CHECK(lane.seal(Kind::text, as_bytes("hello"), as_bytes("aad")) == expected);
    }
}

TEST_CASE("chapter 8: a repeated payload is recognised, also much later") {
    Conversation c;
    Bytes first = c.seal("first");
    CHECK(is_text(c.receive(first), "first"));
    CHECK(c.receive(first).state == State::repeated);
    CHECK(is_text(c.receive(c.seal("second")), "second"));
    CHECK(c.receive(first).state == State::repeated);
    CHECK(is_text(c.receive(c.seal("third")), "third"));
}

TEST_CASE("chapter 8: payloads that did not arrive are counted") {
    Conversation c;
    CHECK(is_text(c.receive(c.seal("1")), "1"));
    Bytes second = c.seal("2");
    c.seal("3");
    CHECK(is_text(c.receive(c.seal("4")), "4", 2));
    CHECK(c.receive(second).state == State::repeated);  // too late: it was reported as lost
    CHECK(is_text(c.receive(c.seal("5")), "5", 0));
}

TEST_CASE("chapter 8: a payload changed at any byte is not shown, and the next one opens") {
    Conversation c;
    const Bytes sealed = c.seal("hello");
    for (std::size_t at = 0; at < sealed.size(); ++at) {
        Bytes changed = sealed;
        changed[at] ^= 0x80;
        CHECK(c.receive(changed).state == State::damaged);
    }
    for (std::size_t size = 0; size < sealed.size(); ++size)
        CHECK(c.receive(ByteView(sealed).first(size)).state == State::damaged);
    CHECK(c.receive(join(sealed, Bytes(1))).state == State::damaged);
    CHECK(is_text(c.receive(sealed), "hello"));  // none of them has moved the counter
    CHECK(is_text(c.receive(c.seal("next")), "next"));
}

TEST_CASE("chapter 8: each lane counts for itself and has its own key") {
    Conversation c;
    Bytes chat = c.seal("chat"), file = c.seal("file", Lane::bulk);
    CHECK(c.receive(chat, Lane::bulk).state == State::damaged);
    CHECK(c.receive(file, Lane::interactive).state == State::damaged);
    CHECK(is_text(c.receive(file, Lane::bulk), "file"));
    CHECK(is_text(c.receive(chat), "chat"));
}

TEST_CASE("chapter 8: each direction has its own keys: a reflected payload does not open") {
    Conversation c;
    Bytes open;
    PairSender back(c.bob, c.alice_card, open);
    PairReceiver alice_receives(
        c.alice, c.bob_card, decode<OpenPayload>(ByteView(open).subspan(1), "somebody's keys").box);
    CHECK(alice_receives.open(Lane::interactive, c.seal("hello")).state == State::damaged);
    Bytes answer = back.seal(Lane::interactive, Kind::text, as_bytes("hi"));
    CHECK(is_text(alice_receives.open(Lane::interactive, ByteView(answer).subspan(1)), "hi"));
}

TEST_CASE("chapter 8: an Open holds the sender's card and a box of the receiver's size") {
    Conversation c;
    CHECK(c.open[0] == static_cast<std::uint8_t>(PayloadType::open));
    CHECK(to_bytes(c.opened().card) == c.alice.card_bytes());
    CHECK(c.opened().box.size() == 256);
}

TEST_CASE("chapter 8: the keys of a pair are computed as the chapter says") {
    // A receiver written from the description alone.
    Conversation c;
    Bytes salt = join(sha256(c.alice.card_bytes()), sha256(c.bob.card_bytes()));
    std::optional<Secret<32>> secret = test_key(1).decrypt(c.box(), salt);
    REQUIRE(secret);
    Secret<32> prk =
        agree(salt, *secret, c.bob.ephemeral().shared_secret(c.alice_card.ephemeral()));
    OpeningLane chat(hkdf_expand(prk, "chatsecure pair interactive lane"));
    OpeningLane files(hkdf_expand(prk, "chatsecure pair bulk lane"));
    CHECK(is_text(chat.open(c.seal("hello")), "hello"));
    CHECK(is_text(files.open(c.seal("bytes", Lane::bulk)), "bytes"));
}

TEST_CASE("chapter 8: an Open is for one login of one person, from one login of another") {
    Conversation c;
    Bytes box = to_bytes(c.box());
    LoginKeys carol(test_key(2), "carol", 3000);
    LoginKeys bob_again(test_key(1), "bob", 3000);
    LoginKeys alice_again(test_key(0), "alice", 3000);
    CheckedCard carol_card(carol.card_bytes(), "carol");
    CheckedCard alice_again_card(alice_again.card_bytes(), "alice");

    // To another person; to the same one, who logged in again; as if from another person; as if
    // from a later login of the same one.
    CHECK(throws<ProtocolError>([&] { PairReceiver(carol, c.alice_card, box); }));
    CHECK(throws<ProtocolError>([&] { PairReceiver(bob_again, c.alice_card, box); }));
    CHECK(throws<ProtocolError>([&] { PairReceiver(c.bob, carol_card, box); }));
    CHECK(throws<ProtocolError>([&] { PairReceiver(c.bob, alice_again_card, box); }));
    box[100] ^= 1;
    CHECK(throws<ProtocolError>([&] { PairReceiver(c.bob, c.alice_card, box); }));
    CHECK(throws<ProtocolError>([&] { PairReceiver(c.bob, c.alice_card, {}); }));
}

TEST_CASE("chapter 8: who has bob's identity key but not his login's reads nothing") {
    // His identity was stolen later. It opens the box, and then the X25519 half is missing.
    Conversation c;
    Digest a = c.alice_card.hash(), b = c.bob_card.hash();
    std::optional<Secret<32>> secret = test_key(1).decrypt(c.box(), join(a, b));
    REQUIRE(secret);
    Secret<32> guess = X25519Key::generate().shared_secret(c.alice_card.ephemeral());
    OpeningLane lane(detail::derive_pair_keys(a, b, *secret, guess).interactive);
    CHECK(lane.open(c.seal("hello")).state == State::damaged);
    // And the X25519 half alone does not do it either.
    Secret<32> x25519 = c.bob.ephemeral().shared_secret(c.alice_card.ephemeral());
    OpeningLane other(detail::derive_pair_keys(a, b, secret_of(0), x25519).interactive);
    CHECK(other.open(c.seal("hello")).state == State::damaged);
    OpeningLane both(detail::derive_pair_keys(a, b, *secret, x25519).interactive);
    CHECK(both.open(c.seal("hello")).state == State::good);
}

TEST_CASE("chapter 8: a room message opens with its key, and not when it or the key was changed") {
    for (std::string_view text : {"", "hello, everybody"}) {
        SealedRoomText room = seal_room_text(text);
        CHECK(open_room_text(room.sealed, room.key) == text);
        CHECK(open_room_text(room.sealed, secret_of(1)) == std::nullopt);
        CHECK(open_room_text({}, room.key) == std::nullopt);
        for (std::size_t at = 0; at < room.sealed.size(); ++at) {
            Bytes changed = room.sealed;
            changed[at] ^= 1;
            CHECK(open_room_text(changed, room.key) == std::nullopt);
        }
    }
    CHECK(hex_of(seal_room_text("x").key) != hex_of(seal_room_text("x").key));
}

TEST_CASE("chapter 8: a lid brings the key of its room message") {
    Conversation c;
    SealedRoomText room = seal_room_text("hello, everybody");
    Digest hash = sha256(room.sealed);
    OpenedPayload lid = c.receiver.open_lid(c.sender.make_lid(room.key, hash), hash);
    REQUIRE(lid.state == State::good);
    CHECK(lid.kind == Kind::room_key);
    CHECK(open_room_text(room.sealed, Secret<32>(lid.body)) == "hello, everybody");
    CHECK(is_text(c.receive(c.seal("private")), "private"));  // they count together: no gap
}

TEST_CASE("chapter 8: a lid does not open with another room text") {
    // A member who knows the key seals other words under it (P6): the lid is not for them.
    Conversation c;
    SealedRoomText room = seal_room_text("I agree");
    Lid lid = c.sender.make_lid(room.key, sha256(room.sealed));
    Bytes forged = gcm_seal(room.key, 0, {}, as_bytes("I refuse"));
    REQUIRE(open_room_text(forged, room.key) == "I refuse");
    CHECK(c.receiver.open_lid(lid, sha256(forged)).state == State::damaged);
    CHECK(c.receiver.open_lid(lid, sha256(room.sealed)).state == State::good);
    CHECK(c.receiver.open_lid(lid, sha256(room.sealed)).state == State::repeated);
}

TEST_CASE("chapter 8: a lid is no private message and a private message no lid") {
    Conversation c;
    SealedRoomText room = seal_room_text("x");
    CHECK(c.receive(c.sender.make_lid(room.key, sha256(room.sealed))).state == State::damaged);
    Bytes sealed = c.seal(std::string(32, 'k'));
    Lid lid{};
    REQUIRE(sealed.size() == lid.size());
    std::copy(sealed.begin(), sealed.end(), lid.begin());
    CHECK(c.receiver.open_lid(lid, sha256(room.sealed)).state == State::damaged);
}

TEST_CASE("chapter 8: the safety number is the same on both sides: 60 digits in groups of five") {
    std::string number = safety_number("alice", fingerprint_of(0), "bob", fingerprint_of(1));
    CHECK(number == safety_number("bob", fingerprint_of(1), "alice", fingerprint_of(0)));
    std::vector<std::string> groups = split_words(number);
    CHECK(groups.size() == 12);
    for (const std::string& group : groups) {
        CHECK(group.size() == 5);
        CHECK(group.find_first_not_of("0123456789") == group.npos);
    }
}

TEST_CASE("chapter 8: another key or another name gives another safety number") {
    std::set<std::string> numbers{
        safety_number("alice", fingerprint_of(0), "bob", fingerprint_of(1)),
        safety_number("alice", fingerprint_of(0), "bob", fingerprint_of(2)),
        safety_number("alice", fingerprint_of(2), "bob", fingerprint_of(1)),
        safety_number("alice", fingerprint_of(1), "bob", fingerprint_of(0)),
        safety_number("alice", fingerprint_of(0), "carol", fingerprint_of(1)),
    };
    CHECK(numbers.size() == 5);
}

TEST_CASE("chapter 8: a man in the middle shows two different safety numbers") {
    const Fingerprint &alice = fingerprint_of(0), &bob = fingerprint_of(1),
                      &his = fingerprint_of(2);
    CHECK(safety_number("alice", alice, "bob", his) != safety_number("alice", his, "bob", bob));
}

TEST_CASE("chapter 8: an identity is pinned when it is first seen, and known afterwards") {
    TempDir dir;
    PinStore pins(dir.path / "known_users");
    CHECK(pins.find("bob") == nullptr);
    CHECK(pins.judge(card_of("bob", 1, 100)) == PinStore::Verdict::first_seen);
    CHECK(pins.judge(card_of("bob", 1, 100)) == PinStore::Verdict::known);
    CHECK(pins.judge(card_of("bob", 1, 200)) == PinStore::Verdict::known);
    CHECK(pins.find("bob")->issued == 200);
    CHECK(pins.find("bob")->fingerprint == fingerprint_of(1));
    CHECK_FALSE(pins.find("bob")->verified);
}

TEST_CASE("chapter 8: an old card is a replay, and leaves the pin as it is") {
    TempDir dir;
    PinStore pins(dir.path / "known_users");
    pins.judge(card_of("bob", 1, 200));
    CHECK(pins.judge(card_of("bob", 1, 199)) == PinStore::Verdict::replayed);
    CHECK(pins.judge(card_of("bob", 1, 1)) == PinStore::Verdict::replayed);
    CHECK(pins.find("bob")->issued == 200);
    CHECK(pins.judge(card_of("bob", 1, 200)) == PinStore::Verdict::known);
}

TEST_CASE("chapter 8: another identity is a change, and stays one until the user trusts it") {
    TempDir dir;
    PinStore pins(dir.path / "known_users");
    pins.judge(card_of("bob", 1, 100));
    pins.mark_verified("bob");
    for (std::uint64_t issued : {1U, 100U, 999U})
        CHECK(pins.judge(card_of("bob", 2, issued)) == PinStore::Verdict::changed);
    CHECK(pins.find("bob")->fingerprint == fingerprint_of(1));
    CHECK(pins.find("bob")->issued == 100);

    pins.trust(card_of("bob", 2, 50));  // his new key, and a clock that is behind
    CHECK(pins.find("bob")->fingerprint == fingerprint_of(2));
    CHECK_FALSE(pins.find("bob")->verified);  // that was the other key
    CHECK(pins.judge(card_of("bob", 2, 50)) == PinStore::Verdict::known);
    CHECK(pins.judge(card_of("bob", 1, 101)) == PinStore::Verdict::changed);
}

TEST_CASE("chapter 8: pins are there again after a restart") {
    TempDir dir;
    std::filesystem::path path = dir.path / "known_users";
    PinStore pins(path);
    pins.judge(card_of("bob", 1, 100));
    pins.judge(card_of("carol", 2, 18'446'744'073'709'551'615U));
    pins.mark_verified("bob");
    pins.save();
    CHECK(mode_of(path) == owner_read_write);
    CHECK(read_text(path) == "bob " + fingerprint_of(1).text() + " 100 verified\ncarol " +
                                 fingerprint_of(2).text() + " 18446744073709551615 unverified\n");

    PinStore again(path);
    CHECK(again.find("bob")->verified);
    CHECK(again.find("bob")->issued == 100);
    CHECK_FALSE(again.find("carol")->verified);
    CHECK(again.judge(card_of("bob", 1, 99)) == PinStore::Verdict::replayed);
    CHECK(again.judge(card_of("bob", 2, 999)) == PinStore::Verdict::changed);
}

TEST_CASE("chapter 8: pins are written when something changed, and not otherwise") {
    TempDir dir;
    std::filesystem::path path = dir.path / "known_users";
    auto writes = [&](PinStore& pins) {
        std::filesystem::remove(path);
        pins.save();
        return std::filesystem::exists(path);
    };
    PinStore pins(path);
    CHECK_FALSE(writes(pins));
    pins.judge(card_of("bob", 1, 100));
    CHECK(writes(pins));
    pins.judge(card_of("bob", 1, 100));  // known
    pins.judge(card_of("bob", 1, 99));   // replayed
    pins.judge(card_of("bob", 2, 101));  // changed
    CHECK_FALSE(writes(pins));
    pins.judge(card_of("bob", 1, 101));  // newer
    CHECK(writes(pins));
    pins.mark_verified("bob");
    CHECK(writes(pins));
    pins.trust(card_of("bob", 2, 102));
    CHECK(writes(pins));
}

TEST_CASE("chapter 8: a damaged line of known_users is named") {
    TempDir dir;
    std::filesystem::path path = dir.path / "known_users";
    const std::string key = fingerprint_of(1).text();
    const std::string bad_lines[]{
        "bob",
        "bob " + key + " 1",
        "bob " + key + " 1 verified more",
        "Bob " + key + " 1 verified",
        "bob " + key.substr(1) + " 1 verified",
        "bob " + key + "A 1 verified",
        "bob SHA256: 1 verified",
        "bob " + key + " x verified",
        "bob " + key + " 1x verified",
        "bob " + key + " -1 verified",
        "bob " + key + " 18446744073709551616 verified",
    };
    for (const std::string& bad : bad_lines) {
        CAPTURE(bad);
        write_text(path, "# comment\n\n" + bad + "\nalice " + key + " 1 verified\n");
        CHECK(contains(complaint([&] { PinStore{path}; }), "known_users, line 3: "));
    }
}

TEST_CASE("chapter 8: each of one's own cards is newer than the one before, whatever the clock") {
    TempDir dir;
    std::filesystem::path path = dir.path / "known_users";
    std::uint64_t last = 0;
    {
        PinStore pins(path);
        for (int i = 0; i < 1000; ++i) {
            std::uint64_t issued = pins.next_issued("alice", fingerprint_of(0));
            if (issued <= last) FAIL("a card that is not newer");
            last = issued;
        }
        CHECK(pins.find("alice")->verified);  // that is oneself
        pins.save();
    }
    // A clock that was set back: the last card seems to be from the year 2100.
    constexpr std::uint64_t year_2100 = 4'102'444'800'000'000;
    write_text(path, concat("alice ", fingerprint_of(0).text(), " ", year_2100, " verified\n"));
    PinStore pins(path);
    CHECK(pins.next_issued("alice", fingerprint_of(0)) == year_2100 + 1);
    CHECK(pins.next_issued("alice", fingerprint_of(0)) == year_2100 + 2);
    CHECK(last < year_2100);
}

TEST_CASE("chapter 8: a pin that is neither verified nor unverified is damaged") {
    TempDir dir;
    write_text(dir.path / "known_users", "bob " + fingerprint_of(1).text() + " 1 verifed\n");
    CHECK(contains(complaint([&] { PinStore{dir.path / "known_users"}; }), "line 1"));
}

TEST_CASE("chapter 8: a user who is pinned twice is an error") {
    TempDir dir;
    write_text(dir.path / "known_users", "bob " + fingerprint_of(1).text() + " 1 verified\nbob " +
                                             fingerprint_of(2).text() + " 1 unverified\n");
    CHECK(contains(complaint([&] { PinStore{dir.path / "known_users"}; }), "line 2"));
}

// ---- main ---------------------------------------------------------------------------------------

namespace {

// Counts test cases, for the last line.
struct Counter : doctest::IReporter {
    static inline unsigned passed = 0, failed = 0;
    explicit Counter(const doctest::ContextOptions&) {}
    void report_query(const doctest::QueryData&) override {}
    void test_run_start() override {}
    void test_run_end(const doctest::TestRunStats& stats) override {
        failed = stats.numTestCasesFailed;
        passed = stats.numTestCasesPassingFilters - failed;
    }
    void test_case_start(const doctest::TestCaseData&) override {}
    void test_case_reenter(const doctest::TestCaseData&) override {}
    void test_case_end(const doctest::CurrentTestCaseStats&) override {}
    void test_case_exception(const doctest::TestCaseException&) override {}
    void subcase_start(const doctest::SubcaseSignature&) override {}
    void subcase_end() override {}
    void log_assert(const doctest::AssertData&) override {}
    void log_message(const doctest::MessageData&) override {}
    void test_case_skipped(const doctest::TestCaseData&) override {}
};
REGISTER_LISTENER("counter", 1, Counter);

}  // namespace

int main(int argc, char** argv) {
    doctest::Context context(argc, argv);
    int code = context.run();
    if (!context.shouldExit())
        std::cout << Counter::passed << " passed, " << Counter::failed << " failed\n";
    return code;
}
