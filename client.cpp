// client: ChatSecure on a terminal. All of the work is in chatsecure.hpp, chapter 12; this program
// puts a front end on it. It has two: one for a person at a terminal, and one for scripts, when
// standard input is a pipe or a file.
//
//      chatsecure::Client  -- events -->  describe()  -- lines -->  Terminal or Script
//                          <-- commands --  parse_command()  <-- what was typed

#include "chatsecure.hpp"

#include <clocale>
#include <csignal>
#include <ctime>
#include <cwchar>
#include <cxxopts.hpp>
#include <iostream>

#ifdef CHATSECURE_LIBEDIT
#include <histedit.h>
#endif
#include <poll.h>
#include <sys/ioctl.h>

namespace {

using chatsecure::concat;
using chatsecure::is_command;
using chatsecure::visible;

// README.md documents these: scripts depend on them.
enum ExitCode {
    fine = 0,
    trouble = 1,         // something on this machine
    usage = 2,           // the flags
    cannot_connect = 3,  // or connected, lost, and given up
    login_refused = 4,
    server_key_bad = 5,  // unknown, changed, or not proved
    wait_timed_out = 6,  // /wait
    not_all_done = 7,    // left as asked, but something could not be done or delivered
};

int exit_code(chatsecure::StopReason reason) {
    using enum chatsecure::StopReason;
    switch (reason) {
        case left:
            return fine;
        case cannot_connect:
            return ExitCode::cannot_connect;
        case login_refused:
            return ExitCode::login_refused;
        case server_key_unknown:
        case server_key_changed:
        case server_distrusted:
            return server_key_bad;
        case local_trouble:
            return trouble;
    }
    return trouble;
}

// ---- Events as lines of text --------------------------------------------------------------------

enum class Tone { quiet, room, own, personal, warning };

struct Line {
    Tone tone = Tone::quiet;
    std::string text;
};

// One line for each event (none for some), without colour and time. What other people wrote is made
// visible() here, and only here.
struct Describe {
    using Lines = std::vector<Line>;

    Lines operator()(const chatsecure::Connecting& e) const {
        return {{Tone::quiet, concat("* connecting to ", visible(e.server))}};
    }
    Lines operator()(const chatsecure::ServerKeyUnknown& e) const {
        return {{Tone::warning, concat("* the server at ", visible(e.server),
                                       " is not known yet; its key is ", e.fingerprint.text())}};
    }
    Lines operator()(const chatsecure::MakingIdentity&) const {
        return {{Tone::quiet, "* making your identity key, which takes a moment"}};
    }
    Lines operator()(const chatsecure::LoggedIn& e) const {
        Line who{Tone::quiet, e.others.empty() ? "* nobody else is online"
                                               : concat("* online: ", listed(e.others))};
        if (e.again) return {{Tone::quiet, concat("* logged in again as ", e.user)}, who};
        return {
            {Tone::quiet, concat("* logged in as ", e.user, " at ", visible(e.server), ", key ",
                                 e.server_key.text())},
            {Tone::quiet, concat("* your identity key is in ", visible(e.identity_file.string()))},
            who};
    }
    Lines operator()(const chatsecure::ConnectionLost& e) const {
        return {{Tone::warning, concat("* connection lost: ", visible(e.reason), " Next try in ",
                                       static_cast<double>(e.retry_in.count()) / 1000,
                                       " s; what you write is sent then.")}};
    }
    Lines operator()(const chatsecure::PersonJoined& e) const {
        return {{Tone::quiet, concat("* ", e.user, " joined")}};
    }
    Lines operator()(const chatsecure::PersonLeft& e) const {
        return {{Tone::quiet, concat("* ", e.user, " left")}};
    }
    Lines operator()(const chatsecure::RoomMessage& e) const {
        return {{e.own ? Tone::own : Tone::room, concat(e.from, ": ", visible(e.text))}};
    }
    Lines operator()(const chatsecure::PrivateMessage& e) const {
        std::string direction = e.own ? concat("you -> ", e.peer) : concat(e.peer, " -> you");
        return {{Tone::personal, concat(direction, ": ", visible(e.text))}};
    }
    Lines operator()(const chatsecure::MessagesLost& e) const {
        return {
            {Tone::warning, concat("* ", e.count, e.count == 1 ? " message" : " messages", " from ",
                                   e.from, e.count == 1 ? " was" : " were", " lost")}};
    }
    Lines operator()(const chatsecure::DeliveryChanged& e) const {
        using enum chatsecure::Delivery;
        std::string reason = visible(e.reason), text = concat(": \"", beginning(e.text), "\"");
        switch (e.state) {
            case waiting:
                return {{Tone::quiet, concat("* waiting ", reason, text)}};
            case sent:
                return {{Tone::quiet, concat("* sent", text)}};
            case delivered:
                return {{Tone::quiet, concat("* delivered to ", e.to, text)}};
            case failed:
                return {{Tone::warning,
                         e.to.empty()
                             ? concat("* not sent to everybody: ", reason, text)
                             : concat("* not delivered to ", e.to, ", who ", reason, text)}};
        }
        return {};
    }
    Lines operator()(const chatsecure::Complaint& e) const {
        return {{Tone::quiet, concat("* ", visible(e.text))}};
    }
    Lines operator()(const chatsecure::IdentityReplaced& e) const {
        return {
            {Tone::warning, concat("* YOUR IDENTITY IS A NEW ONE: this account had another one "
                                   "before. Yours is now ",
                                   e.now.text())},
            {Tone::warning,
             "* Everybody who knew the old one is warned, and reads and sends you nothing until "
             "they /trust you; tell them this fingerprint by telephone."}};
    }
    Lines operator()(const chatsecure::IdentityPinned& e) const {
        return {{Tone::quiet, concat("* first contact with ", e.user, ": ", e.fingerprint.text())}};
    }
    Lines operator()(const chatsecure::IdentityChanged& e) const {
        return {{Tone::warning, concat("* THE IDENTITY OF ", e.user, " HAS CHANGED. Known: ",
                                       e.pinned.text(), " Now: ", e.seen.text())},
                {Tone::warning,
                 concat("* Perhaps ", e.user, " has a new computer, perhaps somebody poses as ",
                        e.user, ". Nothing is sent to them or shown of them until you /trust ",
                        e.user, "; first compare the numbers of /verify ", e.user, ".")}};
    }
    Lines operator()(const chatsecure::SafetyNumber& e) const {
        return {{Tone::quiet, concat("* safety number with ", e.user, ": ", e.digits)},
                {Tone::quiet,
                 concat("* you are ", e.mine.text(), ", ", e.user, " is ", e.theirs.text())},
                {Tone::quiet,
                 e.verified ? concat("* verified: you have compared it with ", e.user)
                            : concat("* not verified: compare it with ", e.user,
                                     " by telephone; if it is the same: /verify ", e.user, " ok")}};
    }
    Lines operator()(const chatsecure::People& e) const {
        std::vector<std::string> names;
        for (const chatsecure::Person& person : e.people)
            names.push_back(concat(
                person.user, person.self ? " (you)" : "", person.verified ? " (verified)" : "",
                person.trusted ? "" : " (not trusted)", person.ignored ? " (ignored)" : ""));
        return {{Tone::quiet, concat("* online: ", listed(names))}};
    }
    Lines operator()(const chatsecure::FileEvent& e) const {
        using enum chatsecure::FileEvent::Phase;
        std::string size = chatsecure::readable_size(e.file.size);
        switch (e.phase) {
            case offered:
                return {
                    {Tone::personal, concat("* ", e.file.user, " offers file ", e.file.number, ": ",
                                            visible(e.file.name), " (", size, "). /accept ",
                                            e.file.number, " or /decline ", e.file.number)}};
            case offer_sent:
                return {{Tone::quiet, concat("* offered ", title(e.file), ", ", size)}};
            case queued:
                return {{Tone::quiet, concat("* ", title(e.file), ": waits for its turn")}};
            case started:
                return {{Tone::quiet,
                         concat("* ", title(e.file),
                                e.done == 0
                                    ? ": begins"
                                    : concat(": goes on at ", chatsecure::readable_size(e.done)))}};
            case progress:
                return {{Tone::quiet, concat("* ", title(e.file), ": ", moving(e))}};
            case finished:
                if (e.done < e.file.size)
                    size += concat(", ", chatsecure::readable_size(e.done), " of it now");
                return {{Tone::own, concat("* ", title(e.file), ": ",
                                           e.file.sending ? std::string("has arrived")
                                                          : "saved as " + visible(e.path.string()),
                                           " (", size, ")")}};
            case interrupted:
            case stopped:
                return {{e.failed ? Tone::warning : Tone::quiet,
                         concat("* ", title(e.file), ": ", visible(e.sentence))}};
        }
        return {};
    }
    Lines operator()(const chatsecure::FileList& e) const {
        Lines lines;
        for (const chatsecure::FileStatus& f : e.files)
            lines.push_back({Tone::quiet, concat("* ", title(f.file), ": ", state(f))});
        if (lines.empty()) lines.push_back({Tone::quiet, "* no files are offered or on their way"});
        return lines;
    }
    Lines operator()(const chatsecure::Notice& e) const {
        return {{Tone::quiet, concat("* ", visible(e.text))}};
    }
    Lines operator()(const chatsecure::Problem& e) const {
        return {{Tone::warning, concat("* ", visible(e.text))}};
    }
    Lines operator()(const chatsecure::Stopped&) const { return {}; }  // see say_why

    // Enough of a message to know which one is meant: its first 200 characters.
    static std::string beginning(std::string_view text) {
        std::string_view rest = text;
        for (int i = 0; i < 200 && !rest.empty(); ++i) chatsecure::take_code_point(rest);
        return visible(text.substr(0, text.size() - rest.size()));
    }
    static std::string title(const chatsecure::FileInfo& file) {
        return concat("file ", file.number, ", ", visible(file.name),
                      file.sending ? " to " : " from ", file.user);
    }
    // How many of `parts` parts of a file are done.
    static std::size_t share(const chatsecure::FileInfo& file, std::uint64_t done, double parts) {
        double whole = static_cast<double>(std::max<std::uint64_t>(file.size, 1));
        return static_cast<std::size_t>(static_cast<double>(done) / whole * parts);
    }
    static std::string percent(const chatsecure::FileInfo& file, std::uint64_t done) {
        return concat(share(file, done, 100), " %");
    }
    static std::string state(const chatsecure::FileStatus& f) {
        using enum chatsecure::FileState;
        std::string size = chatsecure::readable_size(f.file.size);
        if (f.state == queued) return concat(size, ", waits for its turn");
        if (f.state == offered)
            return concat(size,
                          f.file.sending ? ", waits for an answer" : ", waits for your answer");
        return concat(percent(f.file, f.done), " of ", size,
                      f.state == interrupted ? ", interrupted" : "");
    }
    // "43 % of 12.3 MB, 1.2 MB/s, 6 s left"
    static std::string moving(const chatsecure::FileEvent& e) {
        std::string text =
            concat(percent(e.file, e.done), " of ", chatsecure::readable_size(e.file.size), ", ",
                   chatsecure::readable_size(static_cast<std::uint64_t>(e.bytes_per_second)), "/s");
        std::string left = chatsecure::time_left(e.file.size - e.done, e.bytes_per_second);
        return left.empty() ? text : concat(text, ", ", left);
    }
    static std::string listed(const std::vector<std::string>& names) {
        std::string text;
        for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
        return text;
    }
};

std::vector<Line> describe(const chatsecure::Event& event) {
    return std::visit(Describe{}, event.what);
}

// The last words, if they are bad news. The sentence may have several lines of our own making.
void say_why(const chatsecure::Stopped& stopped) {
    if (stopped.reason == chatsecure::StopReason::left) return;
    std::string_view left = stopped.sentence;
    std::string text;
    for (bool more = true; more;) {
        std::size_t end = left.find('\n');
        more = end != left.npos;
        text += concat(visible(left.substr(0, end)), "\n");
        if (more) left.remove_prefix(end + 1);
    }
    std::cerr << concat("client: ", text);
}

// Whether something that our user asked for was not done: it decides the exit code of a script.
// Never what others do to us, or anybody could make a script fail: not their garbage, and not a
// file that was taken without being asked for.
bool is_failure(const chatsecure::Event& event, bool auto_accept) {
    if (const auto* file = std::get_if<chatsecure::FileEvent>(&event.what))
        return file->failed && (file->file.sending || !auto_accept);
    if (const auto* message = std::get_if<chatsecure::DeliveryChanged>(&event.what))
        return message->state == chatsecure::Delivery::failed;
    return std::holds_alternative<chatsecure::Problem>(event.what);
}

// Our messages that wait, and those that have waited: what becomes of them is news.
class LateMessages {
  public:
    // True if the message had been waiting before this.
    bool note(const chatsecure::DeliveryChanged& e) {
        using enum chatsecure::Delivery;
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
    bool is_due(const chatsecure::Event& event) {
        const auto* file = std::get_if<chatsecure::FileEvent>(&event.what);
        if (file == nullptr || file->phase != chatsecure::FileEvent::Phase::progress) return true;
        chatsecure::Clock::time_point now = chatsecure::Clock::now();
        auto [last, first] = last_.try_emplace(file->file.number, now);
        if (first || now - last->second < std::chrono::seconds(5)) return false;
        last->second = now;
        return true;
    }

  private:
    std::map<unsigned, chatsecure::Clock::time_point> last_;
};

// ---- Signals, and what wakes the main thread ----------------------------------------------------

// A signal may be delivered to any thread, so the handler runs beside the main thread: what both
// touch is atomic (and lock-free, which is what a handler may use). The textbook's
// volatile sig_atomic_t is enough only where there is a single thread.
std::atomic<chatsecure::Waker*> main_waker = nullptr;  // while run() runs, longer than any thread
std::atomic<bool> asked_to_leave = false, asked_to_suspend = false, window_changed = false;
static_assert(std::atomic<chatsecure::Waker*>::is_always_lock_free);
static_assert(std::atomic<bool>::is_always_lock_free);

extern "C" void on_signal(int signal) {
    if (signal == SIGTSTP)
        asked_to_suspend = true;
    else if (signal == SIGWINCH)
        window_changed = true;
    else
        asked_to_leave = true;
    if (chatsecure::Waker* waker = main_waker) waker->wake();
}

void catch_signal(int signal) {
    struct sigaction action {};
    action.sa_handler = on_signal;
    sigaction(signal, &action, nullptr);
}

// Waits until standard input or the waker has something, or the time is over (-1: never).
// Returns whether standard input has something. Nobody reading the output any more is a reason to
// leave, and is noticed without writing.
bool wait_for_input(bool want_input, int timeout_ms) {
    std::array<pollfd, 3> entries{{{main_waker.load()->handle(), POLLIN, 0},
                                   {want_input ? STDIN_FILENO : -1, POLLIN, 0},
                                   {STDOUT_FILENO, 0, 0}}};
    if (poll(entries.data(), entries.size(), timeout_ms) <= 0) return false;
    if (entries[0].revents != 0) main_waker.load()->drain();
    if ((entries[2].revents & (POLLERR | POLLHUP)) != 0) asked_to_leave = true;
    return entries[1].revents != 0;
}

// Standard input, line by line, without waiting.
class LineReader {
  public:
    // Reads what is there. Call it when wait_for_input says so.
    void read_more() {
        std::array<char, 65536> block;
        ssize_t got = read(STDIN_FILENO, block.data(), block.size());
        if (got > 0) buffer_.append(block.data(), static_cast<std::size_t>(got));
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

// ---- The front end for scripts ------------------------------------------------------------------
//
// Prints one event per line. "/wait TEXT" holds the script up until an event line contains TEXT,
// and looks at the lines since the last /wait that was fulfilled: a line is never missed because it
// came early, and never found twice.

class Script {
  public:
    Script(chatsecure::Client& client, std::chrono::seconds wait_limit, bool auto_accept)
        : client_(client), wait_limit_(wait_limit), auto_accept_(auto_accept) {}

    int run() {
        for (LineReader input;;) {
            while (std::optional<chatsecure::Event> event = client_.poll_event())
                if (show(*event)) return finish(std::get<chatsecure::Stopped>(event->what));
            flush();
            if (waiting_for_ && find_waited()) waiting_for_.reset();
            if (waiting_for_ && chatsecure::Clock::now() >= deadline_) return give_up();
            if (!waiting_for_) {
                if (std::optional<std::string> line = input.next()) {
                    take(*line);
                    continue;
                }
                if (input.ended() && !std::exchange(leaving_, true)) client_.post(farewell());
            }
            if (wait_for_input(!waiting_for_ && input.wants_more(), milliseconds_left()))
                input.read_more();
        }
    }

  private:
    // True for the last event.
    bool show(const chatsecure::Event& event) {
        if (is_news(event))
            for (const Line& line : describe(event)) print(line.text);
        failed_ = failed_ || is_failure(event, auto_accept_);
        if (const auto* message = std::get_if<chatsecure::PrivateMessage>(&event.what)) {
            reply_to_ = message->peer;
            // To ask for the next event is to say that this one was shown: then it is acknowledged
            // to its sender.
            if (!message->own) flush();
        }
        return std::holds_alternative<chatsecure::Stopped>(event.what);
    }
    // That a message was sent at once is none.
    bool is_news(const chatsecure::Event& event) {
        const auto* message = std::get_if<chatsecure::DeliveryChanged>(&event.what);
        if (message == nullptr) return now_and_then_.is_due(event);
        return late_.note(*message) || message->state != chatsecure::Delivery::sent;
    }
    // Others may write a lot while no /wait looks at it, so what is kept for one has a bound.
    void print(const std::string& line) {
        std::cout << line << '\n';
        unmatched_bytes_ += cost(line);
        unmatched_.push_back(line);
        while (unmatched_bytes_ > most_unmatched_bytes) drop_unmatched();
    }
    void drop_unmatched() {
        unmatched_bytes_ -= cost(unmatched_.front());
        unmatched_.pop_front();
    }
    static std::size_t cost(const std::string& line) { return line.size() + 64; }

    static void flush() {
        if (!std::cout.flush() || asked_to_leave)
            throw chatsecure::Error("Nobody reads the output any more.");
    }
    chatsecure::Leave farewell() const { return {.after_files = true, .patience = wait_limit_}; }

    void take(const std::string& line) {
        if (leaving_) return;
        try {
            if (line.starts_with("/wait ")) {
                waiting_for_ = line.substr(6);
                deadline_ = chatsecure::Clock::now() + wait_limit_;
            } else if (is_command(line, "/help")) {
                for (const auto& [command, meaning] : chatsecure::command_help)
                    std::cout << "* " << command << ": " << meaning << '\n';
            } else if (std::optional<chatsecure::Command> command =
                           chatsecure::parse_command(line, reply_to_)) {
                leaving_ = std::holds_alternative<chatsecure::Leave>(*command);
                client_.post(leaving_ ? farewell() : std::move(*command));
            }
        } catch (const chatsecure::Error& e) {
            std::cout << "* " << visible(e.what()) << '\n';
            failed_ = true;
        }
    }

    bool find_waited() {
        while (!unmatched_.empty()) {
            bool found = unmatched_.front().find(*waiting_for_) != std::string::npos;
            drop_unmatched();
            if (found) return true;
        }
        return false;
    }

    int milliseconds_left() const {
        if (!waiting_for_) return -1;
        auto left =
            std::chrono::ceil<chatsecure::Milliseconds>(deadline_ - chatsecure::Clock::now());
        return static_cast<int>(std::max<std::int64_t>(left.count(), 0));
    }

    int give_up() {
        std::cerr << concat("client: \"", visible(*waiting_for_), "\" did not appear within ",
                            wait_limit_.count(), " s.\n");
        return wait_timed_out;
    }

    int finish(const chatsecure::Stopped& stopped) const {
        std::cout << std::flush;
        say_why(stopped);
        int code = exit_code(stopped.reason);
        return code == fine && (failed_ || waiting_for_) ? not_all_done : code;
    }

    static constexpr std::size_t most_unmatched_bytes = std::size_t{4} << 20;

    chatsecure::Client& client_;
    std::chrono::seconds wait_limit_;
    bool auto_accept_;
    std::deque<std::string> unmatched_;  // event lines that no /wait has looked at yet
    std::size_t unmatched_bytes_ = 0;
    std::optional<std::string> waiting_for_;
    chatsecure::Clock::time_point deadline_;
    std::string reply_to_;
    NowAndThen now_and_then_;
    LateMessages late_;
    bool leaving_ = false, failed_ = false;
};

// ---- The front end for a person -----------------------------------------------------------------

// Shows lines on a terminal, with local time and colour.
class Printer {
  public:
    explicit Printer(bool colour) : colour_(colour) {}

    // `mark` stands at the end of the line, and keeps out of the way.
    std::string format(const Line& line, std::chrono::system_clock::time_point time,
                       std::string mark = "") const {
        std::time_t seconds = std::chrono::system_clock::to_time_t(time);
        std::tm local{};
        localtime_r(&seconds, &local);
        std::array<char, 16> clock{};
        std::strftime(clock.data(), clock.size(), "%H:%M", &local);
        if (!mark.empty()) mark = concat(colour_ ? "  \x1b[0;2m" : "  ", mark);
        if (!colour_) return concat(clock.data(), " ", line.text, mark, "\n");
        return concat("\x1b[2m", clock.data(), "\x1b[0m ", code(line.tone), line.text, mark,
                      "\x1b[0m\n");
    }

  private:
    static const char* code(Tone tone) {
        switch (tone) {
            case Tone::quiet:
                return "\x1b[2m";
            case Tone::room:
                return "";
            case Tone::own:
                return "\x1b[36m";
            case Tone::personal:
                return "\x1b[35m";
            case Tone::warning:
                return "\x1b[1;31m";
        }
        return "";
    }
    bool colour_;
};

// What the terminal needs from whoever uses it.
struct TerminalUser {
    std::function<bool()> show_events;  // prints what has come; false when the client has ended
    std::function<std::vector<std::string>(std::string_view)> complete;  // candidates for a word
};

#ifdef CHATSECURE_LIBEDIT

// A line editor that lets other lines appear above the one that is being typed. libedit asks us for
// each key, and while we wait for one we are free to print: wipe the line that is being edited,
// print, and have libedit draw it again below.
class Terminal {
  public:
    static constexpr bool redraws = true;

    explicit Terminal(TerminalUser user) : user_(std::move(user)) {
        editor_ = el_init("client", stdin, stdout, stderr);
        history_ = history_init();
        if (editor_ == nullptr || history_ == nullptr)
            throw chatsecure::Error("This terminal cannot be used.");
        HistEvent ignored;
        history(history_, &ignored, H_SETSIZE, 500);
        history(history_, &ignored, H_SETUNIQUE, 1);
        el_set(editor_, EL_CLIENTDATA, this);
        el_set(editor_, EL_PROMPT, &Terminal::prompt);
        el_set(editor_, EL_EDITOR, "emacs");
        el_set(editor_, EL_HIST, history, history_);
        el_set(editor_, EL_GETCFN, &Terminal::read_key);
        el_set(editor_, EL_ADDFN, "chat-complete", "Complete a command or a name",
               &Terminal::on_complete);
        el_set(editor_, EL_BIND, "^I", "chat-complete", nullptr);
        el_set(editor_, EL_BIND, "\x1b[H", "ed-move-to-beg", nullptr);
        el_set(editor_, EL_BIND, "\x1b[F", "ed-move-to-end", nullptr);
        el_set(editor_, EL_BIND, "\x1b[3~", "ed-delete-next-char", nullptr);
        el_source(editor_, nullptr);  // the user's ~/.editrc, if there is one
        for (int signal : {SIGINT, SIGTERM, SIGHUP, SIGTSTP, SIGWINCH}) catch_signal(signal);
    }
    Terminal(const Terminal&) = delete;
    Terminal& operator=(const Terminal&) = delete;
    ~Terminal() {
        history_end(history_);
        el_end(editor_);
    }

    // The next line; nothing at the end of the input, or when it is time to leave.
    std::optional<std::string> read_line() {
        int count = 0;
        const char* typed = el_gets(editor_, &count);
        if (typed == nullptr || count <= 0) {
            std::cout << '\n' << std::flush;
            return std::nullopt;
        }
        std::string line(typed);
        if (line.ends_with('\n')) line.pop_back();
        // The line stands on the screen as it was typed; it will come back as a message.
        std::size_t rows = rows_of(prompt_text + line) + 1 + std::exchange(status_shown_, 0);
        std::cout << concat("\x1b[", rows, "A\r\x1b[J") << std::flush;
        HistEvent ignored;
        if (!line.empty()) history(history_, &ignored, H_ENTER, line.c_str());
        return line;
    }

    // Prints above the line that is being typed, and above the status.
    void print(const std::string& text) {
        print_from(rows_below(), text);
        if (!text.empty()) last_ = text;
    }
    // Prints the line `text` in place of the line `old`, if that was printed last and can still be
    // reached: what has left the screen above cannot.
    bool print_again(const std::string& old, const std::string& text) {
        if (old != last_) return false;
        std::size_t up = rows_below() + end_of(without_colour(old)).row + 1;
        if (up >= window().ws_row) return false;
        print_from(up, text);
        last_ = text;
        return true;
    }
    // Rows that stand between the lines above and the line that is being typed.
    void set_status(std::vector<std::string> rows) {
        if (rows == status_) return;
        status_ = std::move(rows);
        if (editing_) print("");
    }

  private:
    static constexpr const char* prompt_text = "> ";
    static char* prompt(EditLine*) {
        static std::array<char, 3> text{'>', ' ', '\0'};  // libedit wants a char*
        return text.data();
    }
    static Terminal* of(EditLine* editor) {
        Terminal* self = nullptr;
        el_get(editor, EL_CLIENTDATA, &self);
        return self;
    }

    // Rows from where the last line printed ends to the cursor.
    std::size_t rows_below() const {
        const LineInfo* line = el_line(editor_);
        std::string before(line->buffer, static_cast<std::size_t>(line->cursor - line->buffer));
        return status_shown_ + (editing_ ? rows_of(prompt_text + before) : 0);
    }
    // Wipes everything from `up` rows above the cursor on, and draws what belongs there.
    void print_from(std::size_t up, const std::string& text) {
        if (up > 0) std::cout << concat("\x1b[", up, "A");
        std::cout << "\r\x1b[J" << text;
        status_shown_ = 0;
        if (editing_) {
            for (const std::string& row : status_) std::cout << fitting(row) << '\n';
            status_shown_ = status_.size();
        }
        std::cout << std::flush;
        if (editing_) el_set(editor_, EL_REFRESH);
    }

    static winsize window() {
        winsize size{};
        bool known = ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
        return known ? size : winsize{24, 80, 0, 0};
    }
    static std::size_t columns() { return window().ws_col; }
    // Calls `use` with the bytes of each letter of `text`, and the columns that it takes.
    static void for_each_letter(std::string_view text,
                                const std::function<void(std::string_view, std::size_t)>& use) {
        std::mbstate_t state{};
        while (!text.empty()) {
            wchar_t letter = 0;
            std::size_t used = std::mbrtowc(&letter, text.data(), text.size(), &state);
            if (used == 0 || used > text.size()) used = 1;
            int cells = letter < 0x20 ? 2 : wcwidth(letter);  // control characters show as ^X
            use(text.substr(0, used), cells > 0 ? static_cast<std::size_t>(cells) : 0);
            text.remove_prefix(used);
        }
    }
    // Where `text`, which begins in the first column, ends.
    struct Place {
        std::size_t row = 0, column = 0;
    };
    static Place end_of(std::string_view text) {
        const std::size_t width = columns();
        Place at;
        for_each_letter(text, [&](std::string_view, std::size_t cells) {
            if (at.column + cells > width) at = {at.row + 1, 0};  // it does not fit: it goes below
            at.column += cells;
        });
        return at;
    }
    // How many rows below its first libedit puts the cursor after `text`.
    static std::size_t rows_of(const std::string& text) {
        Place end = end_of(text);
        return end.row + (end.column == columns() ? 1 : 0);
    }
    // A line of Printer's, as its letters stand on the screen.
    static std::string without_colour(std::string_view line) {
        std::string text;
        for (; !line.empty() && line[0] != '\n'; line.remove_prefix(1)) {
            if (line[0] == '\x1b')
                line.remove_prefix(line.find('m'));
            else
                text += line[0];
        }
        return text;
    }
    // As much of `text` as fits into one row.
    static std::string fitting(const std::string& text) {
        std::string part;
        std::size_t room = columns() - 1;
        for_each_letter(text, [&](std::string_view letter, std::size_t cells) {
            if (cells <= room) part += letter;
            room -= std::min(cells, room);
        });
        return part;
    }

    // Called by libedit for each key. 1: here it is; 0: no more.
    static int read_key(EditLine* editor, wchar_t* key) {
        Terminal* self = of(editor);
        self->editing_ = true;
        chatsecure::detail::AtExit done([&] { self->editing_ = false; });
        std::mbstate_t state{};
        for (;;) {
            if (asked_to_leave || !self->user_.show_events()) return 0;
            if (asked_to_suspend) self->suspend();
            if (window_changed.exchange(false)) {
                el_resize(editor);
                self->last_.clear();  // who knows how the terminal has broken its lines anew
            }
            if (!wait_for_input(true, -1)) continue;
            char byte = 0;
            ssize_t got = read(STDIN_FILENO, &byte, 1);
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) return 0;
            std::size_t used = std::mbrtowc(key, &byte, 1, &state);
            if (used == static_cast<std::size_t>(-2)) continue;  // a letter of several bytes
            if (used == static_cast<std::size_t>(-1)) {
                state = {};
                continue;
            }
            return 1;
        }
    }

    // Ctrl-Z: hand the terminal back as we found it, stop, and go on where we were.
    void suspend() {
        asked_to_suspend = false;
        last_.clear();  // others will print
        el_set(editor_, EL_PREP_TERM, 0);
        std::signal(SIGTSTP, SIG_DFL);
        std::raise(SIGTSTP);
        catch_signal(SIGTSTP);
        el_set(editor_, EL_PREP_TERM, 1);
        el_set(editor_, EL_REFRESH);
    }

    static unsigned char on_complete(EditLine* editor, int) {
        Terminal* self = of(editor);
        const LineInfo* line = el_line(editor);
        std::string_view before(line->buffer,
                                static_cast<std::size_t>(line->cursor - line->buffer));
        std::vector<std::string> candidates = self->user_.complete(before);
        if (candidates.empty()) return CC_ERROR;
        std::size_t word =
            before.size() -
            (before.find_last_of(' ') == before.npos ? 0 : before.find_last_of(' ') + 1);
        std::string common = candidates[0];
        for (const std::string& candidate : candidates) {
            auto [end, ignored] =
                std::mismatch(common.begin(), common.end(), candidate.begin(), candidate.end());
            common.erase(end, common.end());
        }
        if (candidates.size() == 1 && !common.ends_with('/')) common += ' ';
        if (common.size() > word) {
            el_insertstr(editor, common.substr(word).c_str());
        } else {
            self->editing_ = true;
            self->print(Describe::listed(candidates) + "\n");
            self->editing_ = false;
        }
        return CC_REFRESH;
    }

    TerminalUser user_;
    EditLine* editor_ = nullptr;  // given back in the destructor
    History* history_ = nullptr;
    bool editing_ = false;
    std::string last_;  // what was printed last, if it still stands just above
    std::vector<std::string> status_;
    std::size_t status_shown_ = 0;  // rows of it that are on the screen
};

#else

// Without libedit the terminal itself edits the line. What is being typed is not lost when a
// message arrives, but it is not drawn again below it.
class Terminal {
  public:
    static constexpr bool redraws = false;

    explicit Terminal(TerminalUser user) : user_(std::move(user)) {
        for (int signal : {SIGINT, SIGTERM, SIGHUP}) catch_signal(signal);
    }
    std::optional<std::string> read_line() {
        for (;;) {
            if (asked_to_leave || !user_.show_events()) return std::nullopt;
            if (std::optional<std::string> line = input_.next()) return line;
            if (input_.ended()) return std::nullopt;
            if (wait_for_input(true, -1)) input_.read_more();
        }
    }
    void print(const std::string& text) { std::cout << text << std::flush; }
    bool print_again(const std::string&, const std::string&) { return false; }
    void set_status(const std::vector<std::string>&) {}

  private:
    TerminalUser user_;
    LineReader input_;
};

#endif

// A conversation on a terminal.
class Conversation {
  public:
    Conversation(chatsecure::Client& client, bool colour)
        : client_(client),
          printer_(colour),
          terminal_({[this] { return show_events(); },
                     [this](std::string_view before) { return complete(before); }}) {}

    // `logged_in` is the event that began it.
    int run(const chatsecure::Event& logged_in) {
        show(logged_in);
        terminal_.print("Type a message, or /help.\n");
        for (;;) {
            std::optional<std::string> line = terminal_.read_line();
            if (line && !is_command(*line, "/quit")) {
                warned_ = false;
                take(*line);
            } else if (stopped_ || asked_to_leave || may_leave()) {
                return leave();
            }
        }
    }

  private:
    // False when the client has ended.
    bool show_events() {
        while (!stopped_) {
            // To ask for the next event is to say that the last one was shown: was it?
            if (!std::cout) client_.stop();
            std::optional<chatsecure::Event> event = client_.poll_event();
            if (!event) return true;
            show(*event);
        }
        return false;
    }

    void show(const chatsecure::Event& event) {
        const auto* file = std::get_if<chatsecure::FileEvent>(&event.what);
        if (file != nullptr) follow_file(*file);
        if (Terminal::redraws && file != nullptr &&
            file->phase == chatsecure::FileEvent::Phase::progress)
            return;
        if (!now_and_then_.is_due(event)) return;
        if (const auto* e = std::get_if<chatsecure::DeliveryChanged>(&event.what))
            if (!is_news(*e)) return;
        std::string text;
        for (const Line& line : describe(event)) text += printer_.format(line, event.time);
        if (!text.empty()) terminal_.print(text);
        if (const auto* e = std::get_if<chatsecure::RoomMessage>(&event.what))
            if (e->own) own_ = {e->id, event, text};
        if (const auto* e = std::get_if<chatsecure::PrivateMessage>(&event.what))
            if (e->own) own_ = {e->id, event, text};
        if (const auto* message = std::get_if<chatsecure::PrivateMessage>(&event.what))
            reply_to_ = message->peer;
        if (const auto* e = std::get_if<chatsecure::PersonJoined>(&event.what))
            others_.insert(e->user);
        if (const auto* e = std::get_if<chatsecure::PersonLeft>(&event.what))
            others_.erase(e->user);
        if (const auto* e = std::get_if<chatsecure::LoggedIn>(&event.what))
            others_ = {e->others.begin(), e->others.end()};
        if (std::holds_alternative<chatsecure::LoggedIn>(event.what)) online_ = true;
        if (std::holds_alternative<chatsecure::ConnectionLost>(event.what)) online_ = false;
        if (const auto* e = std::get_if<chatsecure::Stopped>(&event.what)) stopped_ = *e;
    }

    // Whether it needs a line of its own. Mostly a mark behind the message says all; but when other
    // lines have come since, what was late and what failed must not go unnoticed.
    bool is_news(const chatsecure::DeliveryChanged& e) {
        using enum chatsecure::Delivery;
        bool late = late_.note(e), marked = e.id != 0 && e.id == own_.id && mark_own(e);
        if (e.state == failed) return true;
        if (e.state == waiting) return !Terminal::redraws;
        bool done = e.state == delivered || e.to.empty();
        return done && late && !marked;
    }
    // Prints the last message of our own again, with what has become of it. False if that cannot be
    // done.
    bool mark_own(const chatsecure::DeliveryChanged& e) {
        std::string text = printer_.format(describe(own_.event).at(0), own_.event.time, mark_of(e));
        if (!terminal_.print_again(own_.shown, text)) return false;
        own_.shown = text;
        return true;
    }
    static std::string mark_of(const chatsecure::DeliveryChanged& e) {
        std::string mark = chatsecure::delivery_mark(e.state);
        return e.state == chatsecure::Delivery::waiting ? concat(mark, " ", visible(e.reason))
                                                        : mark;
    }

    void take(const std::string& line) {
        try {
            if (is_command(line, "/help")) {
                std::string text;
                for (const auto& [command, meaning] : chatsecure::command_help)
                    text +=
                        concat("  ", command, std::string(20 - command.size(), ' '), meaning, "\n");
                terminal_.print(text);
            } else if (std::optional<chatsecure::Command> command =
                           chatsecure::parse_command(line, reply_to_)) {
                client_.post(std::move(*command));
            }
        } catch (const chatsecure::Error& e) {
            terminal_.print(printer_.format({Tone::warning, concat("* ", visible(e.what()))},
                                            std::chrono::system_clock::now()));
        }
    }

    // Files that are on their way, as rows above the prompt.
    void follow_file(const chatsecure::FileEvent& e) {
        using enum chatsecure::FileEvent::Phase;
        if (e.phase == started || e.phase == progress)
            moving_[e.file.number] = e;
        else
            moving_.erase(e.file.number);
        show_status();
    }
    void show_status() {
        constexpr std::size_t most = 3;
        std::vector<std::string> rows;
        for (const auto& [number, e] : moving_) {
            if (rows.size() == most) break;
            constexpr std::size_t width = 20;
            std::size_t full = Describe::share(e.file, e.done, width);
            rows.push_back(concat("[", std::string(full, '#'), std::string(width - full, '.'), "] ",
                                  Describe::moving(e), "  ", e.file.sending ? "to " : "from ",
                                  e.file.user, ": ", visible(e.file.name)));
        }
        if (moving_.size() > most)
            rows.back() += concat("  (and ", moving_.size() - most, " more)");
        terminal_.set_status(std::move(rows));
    }

    // True, except the first time while something would be lost.
    bool may_leave() {
        std::size_t files = moving_.size(), messages = late_.waiting();
        if (files + messages == 0 || std::exchange(warned_, true)) return true;
        auto warn = [&](const std::string& text) {
            terminal_.print(
                printer_.format({Tone::warning, text}, std::chrono::system_clock::now()));
        };
        if (files > 0)
            warn(concat("* ", files, files == 1 ? " file is" : " files are",
                        " on the way. /quit again to leave all the same; it can go on next time."));
        if (messages > 0)
            warn(concat("* ", messages, messages == 1 ? " message waits" : " messages wait",
                        " to be sent. /quit again to leave all the same."));
        return false;
    }

    // The files that a path may mean.
    static std::vector<std::string> complete_path(std::string_view begun) {
        std::size_t slash = begun.rfind('/');
        std::string directory(slash == begun.npos ? "" : begun.substr(0, slash + 1));
        std::string_view name = begun.substr(directory.size());
        std::filesystem::path where =
            directory.empty() ? std::filesystem::path(".") : chatsecure::path_from(directory);
        std::vector<std::string> candidates;
        std::error_code failure;  // then there is nothing to offer
        std::filesystem::directory_iterator entry(where, failure), end;
        for (; !failure && entry != end; entry.increment(failure)) {
            std::string file = entry->path().filename().string();
            if (!file.starts_with(name) || (name.empty() && file.starts_with('.'))) continue;
            std::error_code unknown;
            candidates.push_back(concat(directory, file, entry->is_directory(unknown) ? "/" : ""));
        }
        std::sort(candidates.begin(), candidates.end());
        return candidates;
    }

    // Commands at the beginning of a line, files behind /file USER, names everywhere else.
    std::vector<std::string> complete(std::string_view before) const {
        std::size_t space = before.find_last_of(' ');
        std::string_view word = before.substr(space == before.npos ? 0 : space + 1);
        if (before.starts_with("/file ") && before.find(' ', 6) != before.npos)
            return complete_path(word);
        std::vector<std::string> candidates;
        if (word.starts_with('/') && space == before.npos) {
            for (const auto& help : chatsecure::command_help) {
                std::string_view command = help.usage.substr(0, help.usage.find(' '));
                if (command.starts_with(word)) candidates.emplace_back(command);
            }
        } else if (!word.empty() || space != before.npos) {
            for (const std::string& name : others_)
                if (name.starts_with(word)) candidates.push_back(name);
        }
        return candidates;
    }

    // Says goodbye if there is somebody to say it to. A second Ctrl-C does not wait for the answer.
    // What was written and not delivered is named before the end.
    int leave() {
        asked_to_leave = false;
        if (online_)
            client_.post(chatsecure::Leave{});
        else
            client_.stop();
        while (!stopped_) {
            if (!show_events()) break;
            if (asked_to_leave) client_.stop();
            wait_for_input(false, -1);
        }
        say_why(*stopped_);
        return exit_code(stopped_->reason);
    }

    chatsecure::Client& client_;
    Printer printer_;
    Terminal terminal_;
    std::set<std::string> others_;
    std::string reply_to_;
    std::map<unsigned, chatsecure::FileEvent> moving_;
    NowAndThen now_and_then_;
    LateMessages late_;
    struct {  // the last message of our own
        std::uint64_t id = 0;
        chatsecure::Event event;
        std::string shown;  // as it was printed
    } own_;
    bool warned_ = false;  // that something would be lost
    bool online_ = false;
    std::optional<chatsecure::Stopped> stopped_;
};

// ---- Signing in ---------------------------------------------------------------------------------

struct SignIn {
    std::string user;
    bool register_account = false;
    std::string password_file;
    bool interactive = false;
};

std::string ask(const std::string& question) {
    std::cerr << question << std::flush;
    std::string answer;
    if (!std::getline(std::cin, answer)) throw chatsecure::Error("There was no answer.");
    return answer;
}

// A sentence about what is wrong with an answer; empty if nothing is.
std::string objection_to(const std::function<void()>& check) {
    try {
        check();
    } catch (const chatsecure::Error& e) {
        return e.what();
    }
    return "";
}

std::string ask_name() {
    for (;;) {
        std::string name = ask("Name: ");
        std::string objection = objection_to([&] { name = chatsecure::fold_name(name); });
        if (objection.empty()) return name;
        std::cerr << objection << '\n';
    }
}

chatsecure::SecretBytes ask_new_password(const std::string& user) {
    for (;;) {
        chatsecure::SecretBytes password =
            chatsecure::ask_password(concat("A password for ", user, ": "));
        std::string objection = objection_to([&] { chatsecure::check_new_password(password); });
        if (objection.empty() && password != chatsecure::ask_password("The same again: "))
            objection = "The two are not the same.";
        if (objection.empty()) return password;
        std::cerr << objection << '\n';
    }
}

// Fills in what the flags left open, by asking, if there is somebody to ask.
chatsecure::SecretBytes complete_sign_in(SignIn& sign_in) {
    if (sign_in.user.empty()) {
        if (!sign_in.register_account) {
            std::string choice = ask("Log in, or register a new account? [L/r] ");
            sign_in.register_account = choice.starts_with('r') || choice.starts_with('R');
        }
        sign_in.user = ask_name();
    }
    sign_in.user = chatsecure::fold_name(sign_in.user);
    if (std::optional<chatsecure::SecretBytes> found =
            chatsecure::find_password(sign_in.password_file))
        return std::move(*found);
    return sign_in.register_account
               ? ask_new_password(sign_in.user)
               : chatsecure::ask_password(concat("Password of ", sign_in.user, ": "));
}

// Shows what happens until the login is done, and answers the question about an unknown server.
// Returns LoggedIn or Stopped.
chatsecure::Event wait_for_login(chatsecure::Client& client) {
    while (std::optional<chatsecure::Event> event = client.next_event()) {
        if (std::holds_alternative<chatsecure::LoggedIn>(event->what) ||
            std::holds_alternative<chatsecure::Stopped>(event->what))
            return *event;
        if (const auto* unknown = std::get_if<chatsecure::ServerKeyUnknown>(&event->what)) {
            std::string answer = ask(
                concat("The server at ", visible(unknown->server),
                       " is not known yet. Its key is\n  ", unknown->fingerprint.text(),
                       "\nIs this the fingerprint that the server's operator gave you? [y/N] "));
            client.post(
                chatsecure::AcceptServerKey{answer.starts_with('y') || answer.starts_with('Y')});
        } else {
            for (const Line& line : describe(*event)) std::cerr << line.text << '\n';
        }
    }
    throw chatsecure::Error("The client ended without a reason.");
}

bool wants_colour(bool no_colour_flag) {
    const char* terminal = std::getenv("TERM");
    return !no_colour_flag && std::getenv("NO_COLOR") == nullptr && isatty(STDOUT_FILENO) == 1 &&
           terminal != nullptr && std::string_view(terminal) != "dumb";
}

cxxopts::Options make_options() {
    cxxopts::Options options("client", "The ChatSecure client for the terminal.\n");
    options.positional_help("[HOST[:PORT]]");
    auto add = options.add_options();
    add("server", "where the server is",
        cxxopts::value<std::string>()->default_value("localhost:5000"), "HOST[:PORT]");
    add("u,user", "your user name", cxxopts::value<std::string>()->default_value(""), "NAME");
    add("register", "make the account first");
    add("password-file", "its first line is the password (else CHATSECURE_PASSWORD, else a prompt)",
        cxxopts::value<std::string>()->default_value(""), "FILE");
    add("server-key", "the server's public key, or its fingerprint SHA256:...",
        cxxopts::value<std::string>(), "FILE|FINGERPRINT");
    add("accept-new", "trust the key of a server that is not known yet");
    add("home", "directory of identities and pins",
        cxxopts::value<std::string>()->default_value(chatsecure::default_home().string()), "DIR");
    add("downloads", "where received files go; made when needed",
        cxxopts::value<std::string>()->default_value("downloads"), "DIR");
    add("auto-accept", "accept every file that is offered");
    add("max-size", "the largest file that --auto-accept accepts: 500k, 20M, 1.5G",
        cxxopts::value<std::string>()->default_value("1G"), "SIZE");
    add("verified-room", "what you write to everybody goes to people you have verified only");
    add("wait-limit", "in scripts: how long /wait waits, and leaving for anything to move",
        cxxopts::value<unsigned>()->default_value("30"), "SECONDS");
    add("no-color", "no colour, also if the terminal has some");
    add("version", "print the version and exit");
    add("help", "print this and exit");
    options.parse_positional({"server"});
    return options;
}

// One attempt. Nothing if the login was refused and a person may try again.
std::optional<int> chat(const cxxopts::ParseResult& flags, SignIn& sign_in) {
    chatsecure::HostPort server =
        chatsecure::parse_host_port(flags["server"].as<std::string>(), 5000);
    chatsecure::ClientOptions options;
    options.host = server.host;
    options.port = server.port;
    options.home = flags["home"].as<std::string>();
    options.accept_new_server = flags.count("accept-new") > 0;
    options.verified_room = flags.count("verified-room") > 0;
    options.ask_about_server = sign_in.interactive;
    if (flags.count("server-key") > 0)
        options.server_key = chatsecure::fingerprint_from(flags["server-key"].as<std::string>());
    options.files.downloads = flags["downloads"].as<std::string>();
    options.files.auto_accept = flags.count("auto-accept") > 0;
    options.files.max_size = chatsecure::parse_size(flags["max-size"].as<std::string>());
    if (!sign_in.interactive) options.reconnect_tries = 10;
    options.password = complete_sign_in(sign_in);
    options.user = sign_in.user;
    options.register_account = sign_in.register_account;
    options.on_event = [] { main_waker.load()->wake(); };

    chatsecure::Client client(std::move(options));
    if (!sign_in.interactive)
        return Script(client, std::chrono::seconds(flags["wait-limit"].as<unsigned>()),
                      flags.count("auto-accept") > 0)
            .run();
    chatsecure::Event first = wait_for_login(client);
    if (const auto* stopped = std::get_if<chatsecure::Stopped>(&first.what)) {
        say_why(*stopped);
        if (stopped->reason == chatsecure::StopReason::login_refused) return std::nullopt;
        return exit_code(stopped->reason);
    }
    return Conversation(client, wants_colour(flags.count("no-color") > 0)).run(first);
}

int run(const cxxopts::ParseResult& flags) {
    chatsecure::Waker waker;
    main_waker = &waker;
    chatsecure::detail::AtExit forget_waker([] { main_waker = nullptr; });
    chatsecure::make_write_errors_errors();
    SignIn sign_in{flags["user"].as<std::string>(), flags.count("register") > 0,
                   flags["password-file"].as<std::string>(), isatty(STDIN_FILENO) == 1};
    bool asks = sign_in.interactive && sign_in.password_file.empty() &&
                std::getenv("CHATSECURE_PASSWORD") == nullptr;
    for (int tries = 1;; ++tries) {
        std::optional<int> code = chat(flags, sign_in);
        if (code) return *code;
        if (!asks || tries == 3) return login_refused;
        if (flags["user"].as<std::string>().empty()) sign_in.user.clear();
    }
}

}  // namespace

int main(int argc, char** argv) {
    std::setlocale(LC_ALL, "");
    if (MB_CUR_MAX == 1) std::setlocale(LC_CTYPE, "C.UTF-8");  // chat is UTF-8
    cxxopts::Options options = make_options();
    cxxopts::ParseResult flags;
    try {
        flags = options.parse(argc, argv);
        if (!flags.unmatched().empty())
            throw chatsecure::Error(concat("\"", flags.unmatched()[0], "\" is one word too many."));
        chatsecure::parse_host_port(flags["server"].as<std::string>(), 5000);
        chatsecure::parse_size(flags["max-size"].as<std::string>());
        if (!flags["user"].as<std::string>().empty())
            chatsecure::fold_name(flags["user"].as<std::string>());
        else if (isatty(STDIN_FILENO) != 1 && flags.count("help") + flags.count("version") == 0)
            throw chatsecure::Error("Who are you? Give your user name with -u NAME.");
    } catch (const std::exception& e) {
        std::cerr << "client: " << e.what() << "\n./client --help lists the flags.\n";
        return usage;
    }
    try {
        if (flags.count("help") > 0) {
            std::cout << options.help();
            return fine;
        }
        if (flags.count("version") > 0) {
            std::cout << "ChatSecure client " << chatsecure::version << '\n';
            return fine;
        }
        return run(flags);
    } catch (const std::exception& e) {
        std::cerr << "client: " << e.what() << '\n';
        return trouble;
    }
}
