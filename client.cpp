// client: ChatSecure on a terminal. All of the work is in chatsecure.hpp, chapter 12; this program
// puts a front end on it. It has two: one for a person at a terminal, and one for scripts, when
// standard input or output is a pipe or a file.
//
//      chatsecure::Client  -- events -->  describe()  -- lines -->  Terminal or Script
//                          <-- commands --  parse_command()  <-- what was typed

#include "chatsecure.hpp"

#include <clocale>
#include <csignal>
#include <cxxopts.hpp>
#include <iostream>

#ifdef CHATSECURE_LIBEDIT
#include <histedit.h>
#endif

namespace {

using chatsecure::Client, chatsecure::Error, chatsecure::Event, chatsecure::Stopped;
using chatsecure::concat, chatsecure::is_command, chatsecure::readable_size, chatsecure::visible;
using chatsecure::FileEvent, chatsecure::FileInfo, chatsecure::FileStatus, chatsecure::StopReason;
using chatsecure::LoggedIn, chatsecure::command_help;
using chatsecure::RoomMessage, chatsecure::PrivateMessage, chatsecure::DeliveryChanged;

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

int exit_code(StopReason reason) {
    using enum StopReason;
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

// What a line is to its reader, and how each looks (ECMA-48, "select graphic rendition").
enum class Tone { quiet, room, mention, good, personal, warning };
constexpr std::array<const char*, 6> renditions{"2", "", "1", "36", "35", "1;31"};

struct Line {
    Tone tone = Tone::quiet;
    std::string text;
    std::string speaker{};  // who has said it; then `text` begins with a name,
    std::size_t name = 0;   // which has so many bytes
    std::uint64_t own = 0;  // the number of a message of our own
};

// One line for each event (none for some), without colour and time. What other people wrote is made
// visible() here, and only here. A script gets one row for each, with all that it may look for; a
// person gets fewer words, and a text of several lines as such.
struct Describe {
    using Lines = std::vector<Line>;
    bool for_person = false;
    std::string_view me{};  // whose mentions stand out

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
    Lines operator()(const LoggedIn& e) const {
        Line who{Tone::quiet, e.others.empty()
                                  ? "* nobody else is online"
                                  : concat("* online: ", chatsecure::listed(e.others))};
        if (e.again) return {{Tone::quiet, concat("* logged in again as ", e.user)}, who};
        if (for_person)
            return {{Tone::quiet, concat("* logged in as ", e.user, " at ", visible(e.server))},
                    who};
        return {
            {Tone::quiet, concat("* logged in as ", e.user, " at ", visible(e.server), ", key ",
                                 e.server_key.text())},
            {Tone::quiet, concat("* your identity key is in ", visible(e.identity_file.string()))},
            who};
    }
    Lines operator()(const chatsecure::ConnectionLost& e) const {
        if (for_person)
            return {{Tone::warning, concat("* connection lost: ", visible(e.reason),
                                           " What you write is sent when it is back.")}};
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
    Lines operator()(const RoomMessage& e) const {
        bool mine = !e.own && chatsecure::mentions(e.text, me);
        return {{mine ? Tone::mention : Tone::room, concat(e.from, ": ", body(e.text)), e.from,
                 e.from.size(), e.own ? e.id : 0}};
    }
    Lines operator()(const PrivateMessage& e) const {
        std::string direction = e.own ? concat("you -> ", e.peer) : concat(e.peer, " -> you");
        return {{Tone::personal, concat(direction, ": ", body(e.text)), e.peer, direction.size(),
                 e.own ? e.id : 0}};
    }
    Lines operator()(const chatsecure::MessagesLost& e) const {
        return {
            {Tone::warning, concat("* ", e.count, e.count == 1 ? " message" : " messages", " from ",
                                   e.from, e.count == 1 ? " was" : " were", " lost")}};
    }
    Lines operator()(const DeliveryChanged& e) const {
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
        return {{Tone::quiet, concat("* first contact with ", e.user,
                                     for_person ? "" : concat(": ", e.fingerprint.text()))}};
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
        return {{Tone::quiet,
                 concat("* safety number with ", e.user, ": ",
                        for_person ? "\n    " + chatsecure::safety_number_rows(e.digits, "\n    ")
                                   : e.digits)},
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
            names.push_back(concat(person.user, person.self ? " (you)" : "",
                                   person.verified ? " (verified)" : "",
                                   chatsecure::may_pass(person.standing) ? "" : " (not trusted)",
                                   person.ignored ? " (ignored)" : ""));
        return {{Tone::quiet, concat("* online: ", chatsecure::listed(names))}};
    }
    Lines operator()(const chatsecure::PersonChanged&) const { return {}; }
    Lines operator()(const FileEvent& e) const {
        using enum FileEvent::Phase;
        std::string size = readable_size(e.file.size);
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
                                e.done == 0 ? ": begins"
                                            : concat(": goes on at ", readable_size(e.done)))}};
            case progress:
                return {
                    {Tone::quiet, concat("* ", title(e.file), ": ", chatsecure::progress_text(e))}};
            case finished:
                if (e.done < e.file.size) size += concat(", ", readable_size(e.done), " of it now");
                return {{Tone::good, concat("* ", title(e.file), ": ",
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
        for (const FileStatus& f : e.files)
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
    Lines operator()(const Stopped&) const { return {}; }  // see last_words

    std::string body(std::string_view text) const {
        return for_person ? chatsecure::visible_lines(text) : visible(text);
    }
    // Enough of a message to know which one is meant: its first 200 characters.
    static std::string beginning(std::string_view text) {
        std::string_view rest = text;
        for (int i = 0; i < 200 && !rest.empty(); ++i) chatsecure::take_code_point(rest);
        return visible(text.substr(0, text.size() - rest.size()));
    }
    static std::string title(const FileInfo& file) {
        return concat("file ", file.number, ", ", visible(file.name),
                      file.sending ? " to " : " from ", file.user);
    }
    static std::string state(const FileStatus& f) {
        using enum chatsecure::FileState;
        std::string size = readable_size(f.file.size);
        if (f.state == queued) return concat(size, ", waits for its turn");
        if (f.state == offered)
            return concat(size,
                          f.file.sending ? ", waits for an answer" : ", waits for your answer");
        return concat(chatsecure::parts_done(f.done, f.file.size, 100), " % of ", size,
                      f.state == interrupted ? ", interrupted" : "");
    }
};

chatsecure::TerminalSize window() { return chatsecure::terminal_size(); }

// `line` in rows that fit the window; what is said does not go below the time, nor what a command
// means below the command.
std::string in_rows(std::string_view line) {
    return chatsecure::in_rows(line, window().ws_col - 1u, line.starts_with("  ") ? 22 : 6);
}

// Says something beside the conversation, in rows if somebody reads it on a terminal.
void tell(const std::string& text) {
    std::cerr << concat(chatsecure::is_terminal(2) ? in_rows(text) : text, "\n");
}

// Says why it has ended, if that is bad news, in one or several lines of our own making.
int last_words(const Stopped& stopped) {
    if (stopped.reason != StopReason::left)
        tell(concat("client: ", chatsecure::visible_lines(stopped.sentence)));
    return exit_code(stopped.reason);
}

// Whether something that our user asked for was not done: it decides the exit code of a script.
// Never what others do to us, or anybody could make a script fail: not their garbage, and not a
// file that was taken without being asked for.
bool is_failure(const Event& event, bool auto_accept) {
    if (const auto* file = std::get_if<FileEvent>(&event.what))
        return file->failed && (file->file.sending || !auto_accept);
    if (const auto* message = std::get_if<DeliveryChanged>(&event.what))
        return message->state == chatsecure::Delivery::failed;
    return std::holds_alternative<chatsecure::Problem>(event.what);
}

// ---- Signals, and what wakes the main thread ----------------------------------------------------

// A signal may be delivered to any thread, so the handler runs beside the main thread: what both
// touch is atomic (and lock-free, which is what a handler may use). The textbook's
// volatile sig_atomic_t is enough only where there is a single thread.
std::atomic<chatsecure::Waker*> main_waker = nullptr;  // while run() runs, longer than any thread
std::atomic<bool> asked_to_leave = false;
std::atomic<bool> half_typed = false, asked_to_clear = false;  // Ctrl-C clears a begun line
static_assert(std::atomic<chatsecure::Waker*>::is_always_lock_free);
static_assert(std::atomic<bool>::is_always_lock_free);

extern "C" void on_signal(int signal) {
    if (signal == SIGINT && half_typed.exchange(false))
        asked_to_clear = true;
    else
        asked_to_leave = true;
    if (chatsecure::Waker* waker = main_waker) waker->wake();
}

#ifdef CHATSECURE_LIBEDIT
// What only the line editor has to know: Ctrl-Z, and another size of the window.
std::atomic<bool> asked_to_suspend = false, window_changed = false;
extern "C" void on_terminal_signal(int signal) {
    (signal == SIGTSTP ? asked_to_suspend : window_changed) = true;
    if (chatsecure::Waker* waker = main_waker) waker->wake();
}

void catch_signal(int signal) {
    struct sigaction action {};
    action.sa_handler = on_terminal_signal;
    sigaction(signal, &action, nullptr);
}
#endif

// Waits until standard input or the waker has something, or the time is over (-1: never).
// Returns whether standard input has something. Nobody reading the output any more is a reason to
// leave, and is noticed without writing.
bool wait_for_input(bool want_input, int timeout_ms) {
    chatsecure::Readiness ready =
        chatsecure::wait_for_input(*main_waker.load(), want_input, timeout_ms);
    if (ready.output_gone) asked_to_leave = true;
    return ready.input;
}

// ---- The front end for scripts ------------------------------------------------------------------
//
// Prints one event per line. "/wait TEXT" holds the script up until an event line contains TEXT,
// and looks at the lines since the last /wait that was fulfilled: a line is never missed because it
// came early, and never found twice.

class Script {
  public:
    Script(Client& client, std::chrono::seconds wait_limit, bool auto_accept)
        : client_(client), wait_limit_(wait_limit), auto_accept_(auto_accept) {}

    int run() {
        for (chatsecure::LineReader input;;) {
            while (std::optional<Event> event = client_.poll_event())
                if (show(*event)) return finish(std::get<Stopped>(event->what));
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
    bool show(const Event& event) {
        if (is_news(event))
            for (const Line& line : std::visit(Describe{}, event.what)) print(line.text);
        failed_ = failed_ || is_failure(event, auto_accept_);
        if (const auto* message = std::get_if<PrivateMessage>(&event.what)) {
            reply_to_ = message->peer;
            // To ask for the next event is to say that this one was shown: then it is acknowledged
            // to its sender.
            if (!message->own) flush();
        }
        return std::holds_alternative<Stopped>(event.what);
    }
    // That a message was sent at once is none.
    bool is_news(const Event& event) {
        const auto* message = std::get_if<DeliveryChanged>(&event.what);
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
        if (!std::cout.flush() || asked_to_leave) throw Error("Nobody reads the output any more.");
    }
    chatsecure::Leave farewell() const { return {.after_files = true, .patience = wait_limit_}; }

    void take(const std::string& line) {
        if (leaving_) return;
        try {
            if (line.starts_with("/wait ")) {
                waiting_for_ = line.substr(6);
                deadline_ = chatsecure::Clock::now() + wait_limit_;
            } else if (auto asked = chatsecure::help_asked(line); !asked.empty()) {
                for (const auto& [command, meaning] : asked)
                    std::cout << "* " << command << ": " << meaning << '\n';
            } else if (std::optional<chatsecure::Command> command =
                           chatsecure::parse_command(line, reply_to_)) {
                leaving_ = std::holds_alternative<chatsecure::Leave>(*command);
                client_.post(leaving_ ? farewell() : std::move(*command));
            }
        } catch (const Error& e) {
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

    int finish(const Stopped& stopped) const {
        std::cout << std::flush;
        int code = last_words(stopped);
        return code == fine && (failed_ || waiting_for_) ? not_all_done : code;
    }

    static constexpr std::size_t most_unmatched_bytes = std::size_t{4} << 20;

    Client& client_;
    std::chrono::seconds wait_limit_;
    bool auto_accept_;
    std::deque<std::string> unmatched_;  // event lines that no /wait has looked at yet
    std::size_t unmatched_bytes_ = 0;
    std::optional<std::string> waiting_for_;
    chatsecure::Clock::time_point deadline_;
    std::string reply_to_;
    chatsecure::NowAndThen now_and_then_;
    chatsecure::LateMessages late_;
    bool leaving_ = false, failed_ = false;
};

// ---- The front end for a person -----------------------------------------------------------------

// Lines with local time and colour.
class Printer {
  public:
    explicit Printer(bool colour) : colour_(colour) {}

    // `mark` stands at the end of the line, and keeps out of the way.
    std::string format(const Line& line, std::chrono::system_clock::time_point time,
                       const std::string& mark = "") const {
        std::string name = line.text.substr(0, line.name), rest = line.text.substr(line.name);
        if (line.tone == Tone::mention) name = in("7", name);
        if (!name.empty()) name = in(concat("1;38;5;", colour_of(line.speaker)), name);
        const char* tone = renditions.at(static_cast<std::size_t>(line.tone));
        return concat(in("2", chatsecure::time_text(time, "%H:%M")), " ", name, in(tone, rest),
                      mark.empty() ? "" : in("2", "  " + mark));
    }
    // `text` in a colour or another way to stand out (ECMA-48, "select graphic rendition").
    std::string in(const std::string& rendition, const std::string& text) const {
        if (!colour_ || rendition.empty()) return text;
        return concat("\x1b[", rendition, "m", text, "\x1b[0m");
    }

  private:
    // Of the usual 256 colours those that can be read on white and on black.
    static int colour_of(std::string_view user) {
        static constexpr std::array<int, 12> colours{33,  35, 37, 98,  136, 166,
                                                     168, 68, 71, 133, 31,  130};
        return colours[chatsecure::person_colour(user, colours.size())];
    }
    bool colour_;
};

// What the terminal needs from whoever uses it.
struct TerminalUser {
    std::function<bool()> show_events;  // prints what has come; false when the client has ended
    std::function<std::vector<std::string>()> names;  // that can be completed
};

// What is pasted comes between brackets when a terminal is asked for them, for it may have been
// copied from where somebody has put "/file mallory secret" between two lines.
constexpr const char *brackets_on = "\x1b[?2004h", *brackets_off = "\x1b[?2004l";
constexpr std::string_view paste_begin = "\x1b[200~", paste_end = "\x1b[201~";

// What it becomes in the line that is being typed.
std::string without_brackets(std::string text) {
    for (std::string_view bracket : {paste_begin, paste_end})
        for (std::size_t at; (at = text.find(bracket)) != text.npos;)
            text.erase(at, bracket.size());
    while (text.ends_with('\n')) text.pop_back();
    return chatsecure::visible_lines(text);
}

#ifdef CHATSECURE_LIBEDIT

// A line editor that lets other lines appear above the one that is being typed. libedit asks us for
// each key, and while we wait for one we are free to print: wipe the line that is being edited,
// print, and have libedit draw it again below.
class Terminal {
  public:
    static constexpr bool redraws = true;

    explicit Terminal(TerminalUser user) : user_(std::move(user)) {
        tcgetattr(STDIN_FILENO, &found_);
        editor_ = el_init("client", stdin, stdout, stderr);
        history_ = history_init();
        if (editor_ == nullptr || history_ == nullptr) throw Error("This terminal cannot be used.");
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
        el_set(editor_, EL_ADDFN, "chat-paste", "Take what is pasted", &Terminal::on_paste);
        el_source(editor_, nullptr);  // the user's ~/.editrc, if there is one
        el_set(editor_, EL_BIND, "^I", "chat-complete", nullptr);
        el_set(editor_, EL_BIND, paste_begin.data(), "chat-paste", nullptr);
        el_set(editor_, EL_BIND, "\x1b[3~", "ed-delete-next-char", nullptr);
        // No echo of what is typed between two lines; and Enter is not the end of a pasted line.
        el_set(editor_, EL_SETTY, "-x", "-echo", nullptr);
        el_set(editor_, EL_SETTY, "-d", "-inlcr", "-icrnl", nullptr);
        chatsecure::when_asked_to_end(on_signal);
        for (int signal : {SIGTSTP, SIGWINCH}) catch_signal(signal);
        std::cout << brackets_on;
    }
    Terminal(const Terminal&) = delete;
    Terminal& operator=(const Terminal&) = delete;
    ~Terminal() {
        std::cout << brackets_off << std::flush;
        history_end(history_);
        el_end(editor_);
    }

    // The next line; nothing at the end of the input, or when it is time to leave.
    std::optional<std::string> read_line() {
        draw_status();
        std::cout << std::flush;
        int count = 0;
        const char* typed = el_gets(editor_, &count);
        half_typed = false;
        if (typed == nullptr || count <= 0) {
            draw_from(status_shown_ + rows_of(prompt_text + before_cursor(editor_)), "");
            return std::nullopt;
        }
        std::string line(typed);
        if (line.ends_with('\n')) line.pop_back();
        // The line stands on the screen as it was typed; it will come back as a message.
        draw_from(rows_of(prompt_text + line) + 1 + status_shown_, "");
        HistEvent ignored;
        if (!line.empty()) history(history_, &ignored, H_ENTER, line.c_str());
        return line;
    }

    // Prints above the line that is being typed, and above the status. Returns the line's number.
    std::size_t print(const std::string& line) {
        std::size_t up = rows_below();
        lines_.push_back(line);
        if (lines_.size() > most_lines) lines_.pop_front();
        draw_from(up, in_rows(line) + "\n");
        return ++printed_;
    }
    // Prints `line` in place of the one of that number, if it can still be reached: what has left
    // the screen above cannot.
    bool print_again(std::size_t number, const std::string& line) {
        std::size_t lines_below = printed_ - number;
        if (lines_below >= lines_.size()) return false;
        const auto at = lines_.end() - static_cast<std::ptrdiff_t>(lines_below) - 1;
        std::size_t up = rows_below();
        for (auto it = at; it != lines_.end(); ++it) up += rows_taken(*it);
        if (up >= window().ws_row) return false;
        *at = line;
        std::string rows;
        for (auto it = at; it != lines_.end(); ++it) rows += in_rows(*it) + "\n";
        draw_from(up, rows);
        return true;
    }
    // The row between the lines above and the line that is being typed.
    void set_status(const std::string& row) {
        if (std::exchange(status_, row) != row && editing_) draw_from(rows_below(), "");
    }

  private:
    static constexpr std::size_t most_lines = 500;  // more stand on no screen
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
        return status_shown_ + (editing_ ? rows_of(prompt_text + before_cursor(editor_)) : 0);
    }
    static std::string before_cursor(EditLine* editor) {
        const LineInfo* line = el_line(editor);
        return {line->buffer, line->cursor};
    }
    // Wipes everything from `up` rows above the cursor on, and draws what belongs there. How far up
    // that is nobody knows when the window has another size, for its terminal has broken its rows
    // anew in its own way; and one cannot go above the window. Then all of it is drawn anew.
    void draw_from(std::size_t up, const std::string& text) {
        if (window_changed.exchange(false) || up >= window().ws_row) {
            el_resize(editor_);
            std::cout << "\x1b[H\x1b[J";
            draw_last_lines();
        } else {
            if (up > 0) std::cout << concat("\x1b[", up, "A");
            std::cout << "\r\x1b[J" << text;
        }
        status_shown_ = 0;
        if (editing_) draw_status();
        std::cout << std::flush;
        if (editing_) el_set(editor_, EL_REFRESH);
    }
    void draw_last_lines() {  // at least one
        std::size_t room = window().ws_row, first = lines_.size();
        for (std::size_t rows = 3; first > 0; --first) {  // the status, the line, and one below it
            rows += rows_taken(lines_[first - 1]);
            if (rows > room && first < lines_.size()) break;
        }
        for (; first < lines_.size(); ++first) std::cout << in_rows(lines_[first]) << '\n';
    }
    void draw_status() {
        std::cout << chatsecure::first_columns(status_, window().ws_col - 1u) << '\n';
        status_shown_ = 1;
    }

    static std::size_t rows_taken(const std::string& line) {
        return chatsecure::rows_down(in_rows(line), window().ws_col, false) + 1;
    }
    // How many rows below its first libedit puts the cursor after `text`.
    static std::size_t rows_of(const std::string& text) {
        return chatsecure::rows_down(text, window().ws_col, true);
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
            if (asked_to_clear.exchange(false)) self->clear();
            if (window_changed) self->draw_from(0, "");
            const LineInfo* line = el_line(editor);
            half_typed = line->lastchar != line->buffer;
            if (!wait_for_input(true, -1)) continue;
            char byte = 0;
            ssize_t got = read(STDIN_FILENO, &byte, 1);
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) return 0;
            if (byte == '\f') window_changed = true;  // Ctrl-L: libedit would wipe the status, too
            std::size_t used = std::mbrtowc(key, &byte, 1, &state);
            if (used == static_cast<std::size_t>(-1)) state = {};
            if (used <= 1 && byte != '\f')
                return 1;  // else it is no letter, or not yet a whole one
        }
    }

    // Ctrl-Z: hand the terminal back as we found it, stop, and go on where we were, below what
    // others have printed.
    void suspend() {
        asked_to_suspend = false;
        std::cout << brackets_off << std::flush;
        el_set(editor_, EL_PREP_TERM, 0);
        tcsetattr(STDIN_FILENO, TCSADRAIN, &found_);
        std::signal(SIGTSTP, SIG_DFL);
        std::raise(SIGTSTP);
        catch_signal(SIGTSTP);
        el_set(editor_, EL_PREP_TERM, 1);
        std::cout << brackets_on << std::string(window().ws_row, '\n');
        window_changed = true;
    }
    // Ctrl-C in a line that has begun.
    void clear() {
        std::size_t up = rows_below();
        const LineInfoW* line = el_wline(editor_);
        auto letters = static_cast<int>(line->lastchar - line->buffer);
        el_cursor(editor_, letters);
        el_deletestr(editor_, letters);
        draw_from(up, "");
    }

    // All that is pasted becomes part of the line that is being typed, where one sees it, and
    // nothing happens before Enter.
    static unsigned char on_paste(EditLine* editor, int) {
        std::string text;
        for (char byte = 0; !asked_to_leave && !text.ends_with(paste_end);) {
            if (!wait_for_input(true, -1)) continue;
            char before = byte;
            if (read(STDIN_FILENO, &byte, 1) <= 0) break;
            if (byte != '\n' || before != '\r') text += byte == '\r' ? '\n' : byte;
        }
        el_insertstr(editor, without_brackets(text).c_str());
        return CC_REFRESH;
    }

    static unsigned char on_complete(EditLine* editor, int) {
        Terminal* self = of(editor);
        auto [words, insert] = chatsecure::complete(before_cursor(editor), self->user_.names());
        if (words.empty()) return CC_ERROR;
        if (!insert.empty()) {
            el_insertstr(editor, insert.c_str());
        } else {
            self->editing_ = true;
            self->print(chatsecure::listed(words));
            self->editing_ = false;
        }
        return CC_REFRESH;
    }

    TerminalUser user_;
    termios found_{};             // what the terminal was like
    EditLine* editor_ = nullptr;  // given back in the destructor
    History* history_ = nullptr;
    bool editing_ = false;
    std::size_t printed_ = 0;        // lines so far
    std::deque<std::string> lines_;  // the last of them
    std::string status_;
    std::size_t status_shown_ = 0;  // rows of it that are on the screen
};

#else

// Without libedit the terminal itself edits the line. What is being typed is not lost when a
// message arrives, but it is not drawn again below it.
class Terminal {
  public:
    static constexpr bool redraws = false;

    explicit Terminal(TerminalUser user) : user_(std::move(user)) {
        chatsecure::when_asked_to_end(on_signal);
        if (knows_brackets_) std::cout << brackets_on << std::flush;
    }
    ~Terminal() { std::cout << (knows_brackets_ ? brackets_off : "") << std::flush; }

    // A line that is pasted sends nothing: all of it goes with what the last Enter sends.
    std::optional<std::string> read_line() {
        for (std::string text;;) {
            if (asked_to_leave || !user_.show_events()) return std::nullopt;
            while (std::optional<std::string> line = input_.next()) {
                text += *line;
                std::size_t begun = text.rfind(paste_begin), ended = text.rfind(paste_end);
                if (begun == text.npos) return text;
                if (ended != text.npos && ended > begun) return without_brackets(text);
                text += '\n';
            }
            if (input_.ended()) return std::nullopt;
            if (wait_for_input(true, -1)) input_.read_more();
        }
    }
    std::size_t print(const std::string& line) {
        std::cout << in_rows(line) << '\n' << std::flush;
        return 0;
    }
    bool print_again(std::size_t, const std::string&) { return false; }
    void set_status(const std::string&) {}

  private:
    TerminalUser user_;
    chatsecure::LineReader input_;
    bool knows_brackets_ = std::getenv("TERM") != nullptr;  // a Windows console would show them
};

#endif

std::string row_of(const chatsecure::CommandHelp& help) {
    return concat("  ", help.usage, std::string(20 - help.usage.size(), ' '), help.meaning);
}

// A conversation on a terminal.
class Conversation {
  public:
    Conversation(Client& client, bool colour, bool bell)
        : client_(client),
          printer_(colour),
          bell_(bell),
          terminal_({[this] { return show_events(); },
                     [this] { return std::vector<std::string>(others_.begin(), others_.end()); }}) {
    }

    // `logged_in` is the event that began it.
    int run(const Event& logged_in) {
        show(logged_in);
        terminal_.print("Type a message, or /help.");
        for (;;) {
            std::optional<std::string> line = terminal_.read_line();
            unread_.clear();
            if (line && !is_command(*line, "/quit")) {
                warned_ = false;
                take(*line);
            } else if (stopped_ || asked_to_leave || may_leave()) {
                return leave();
            }
            show_status();
        }
    }

  private:
    // False when the client has ended.
    bool show_events() {
        while (!stopped_) {
            // To ask for the next event is to say that the last one was shown: was it?
            if (!std::cout) client_.stop();
            std::optional<Event> event = client_.poll_event();
            if (!event) return true;
            show(*event);
        }
        return false;
    }

    void show(const Event& event) {
        note(event);
        if (needs_lines(event))
            for (const Line& line : std::visit(Describe{true, me_}, event.what)) {
                std::size_t number = terminal_.print(printer_.format(line, event.time));
                if (line.own != 0) own_[line.own] = {line, event.time, number};
            }
        if (own_.size() > 100) own_.erase(own_.begin());  // it has left the screen
        if (rings(event)) std::cout << '\a' << std::flush;
        show_status();
    }
    // What is remembered of an event.
    void note(const Event& event) {
        if (const auto* e = std::get_if<FileEvent>(&event.what)) follow_file(*e);
        if (const auto* e = std::get_if<PrivateMessage>(&event.what)) {
            reply_to_ = e->peer;
            if (!e->own) unread_.insert(e->peer);
        }
        if (const auto* e = std::get_if<chatsecure::PersonJoined>(&event.what))
            others_.insert(e->user);
        if (const auto* e = std::get_if<chatsecure::PersonLeft>(&event.what))
            others_.erase(e->user);
        if (const auto* e = std::get_if<LoggedIn>(&event.what)) {
            me_ = e->user;
            others_ = {e->others.begin(), e->others.end()};
            lost_ = 0;
        }
        if (std::holds_alternative<chatsecure::ConnectionLost>(event.what)) ++lost_;
        if (const auto* e = std::get_if<Stopped>(&event.what)) stopped_ = *e;
    }
    // Of an outage, the status tells what comes after its beginning; of a file, its progress.
    bool needs_lines(const Event& event) {
        if (const auto* e = std::get_if<DeliveryChanged>(&event.what)) return is_news(*e);
        if (std::holds_alternative<chatsecure::Connecting>(event.what)) return false;
        if (std::holds_alternative<chatsecure::ConnectionLost>(event.what)) return lost_ == 1;
        const auto* file = std::get_if<FileEvent>(&event.what);
        bool moves = file != nullptr && file->phase == FileEvent::Phase::progress;
        return moves && Terminal::redraws ? false : now_and_then_.is_due(event);
    }
    bool rings(const Event& event) const {
        if (const auto* e = std::get_if<RoomMessage>(&event.what))
            return bell_ && !e->own && chatsecure::mentions(e->text, me_);
        const auto* e = std::get_if<PrivateMessage>(&event.what);
        return bell_ && e != nullptr && !e->own;
    }

    // Whether it needs a line of its own. Mostly a mark behind the message says all; but what has
    // failed must not go unnoticed, nor what was late when its message has left the screen.
    bool is_news(const DeliveryChanged& e) {
        using enum chatsecure::Delivery;
        bool late = late_.note(e), marked = mark_own(e);
        if (e.state == failed) return true;
        if (e.state == waiting) return !Terminal::redraws;
        bool done = e.state == delivered || e.to.empty();
        return done && late && !marked;
    }
    // Prints a message of our own again, with what has become of it. False if that cannot be done.
    bool mark_own(const DeliveryChanged& e) {
        auto own = own_.find(e.id);
        if (own == own_.end()) return false;
        const auto& [line, time, number] = own->second;
        std::string mark = chatsecure::delivery_mark(e.state);
        if (e.state == chatsecure::Delivery::waiting) mark += concat(" ", visible(e.reason));
        return terminal_.print_again(number, printer_.format(line, time, mark));
    }

    void take(const std::string& line) {
        try {
            if (auto asked = chatsecure::help_asked(line); !asked.empty()) {
                for (const chatsecure::CommandHelp& help : asked) terminal_.print(row_of(help));
            } else if (std::optional<chatsecure::Command> command =
                           chatsecure::parse_command(line, reply_to_)) {
                client_.post(std::move(*command));
            }
        } catch (const Error& e) {
            warn(concat("* ", visible(e.what())));
        }
    }
    void warn(const std::string& text) {
        terminal_.print(printer_.format({Tone::warning, text}, std::chrono::system_clock::now()));
    }

    void follow_file(const FileEvent& e) {
        using enum FileEvent::Phase;
        if (e.phase == started || e.phase == progress)
            moving_[e.file.number] = e;
        else
            moving_.erase(e.file.number);
    }
    // One row says how things are.
    void show_status() {
        std::size_t n = others_.size(), waiting = late_.waiting();
        std::string row = lost_ > 0
                              ? concat("no connection, ", lost_, lost_ == 1 ? " try" : " tries")
                          : n == 0 ? "nobody else is here"
                                   : concat(n, n == 1 ? " other" : " others", " online");
        if (waiting > 0) row += concat(" | ", waiting, waiting == 1 ? " waits" : " wait");
        if (!unread_.empty())
            row += concat(" | from ", chatsecure::listed({unread_.begin(), unread_.end()}));
        if (!moving_.empty()) row += concat(" | ", bar(moving_.begin()->second));
        if (moving_.size() > 1) row += concat("  (and ", moving_.size() - 1, " more)");
        terminal_.set_status(printer_.in("7", concat("-- ", row, " --")));
    }
    static std::string bar(const FileEvent& e) {
        constexpr std::size_t width = 12;
        std::size_t full = chatsecure::parts_done(e.done, e.file.size, width);
        return concat("[", std::string(full, '#'), std::string(width - full, '.'), "] ",
                      chatsecure::progress_text(e), "  ", e.file.sending ? "to " : "from ",
                      e.file.user, ": ", visible(e.file.name));
    }

    // True, except the first time while something would be lost.
    bool may_leave() {
        std::size_t files = moving_.size(), messages = late_.waiting();
        if (files + messages == 0 || std::exchange(warned_, true)) return true;
        if (files > 0)
            warn(concat("* ", files, files == 1 ? " file is" : " files are",
                        " on the way. /quit again to leave all the same; it can go on next time."));
        if (messages > 0)
            warn(concat("* ", messages, messages == 1 ? " message waits" : " messages wait",
                        " to be sent. /quit again to leave all the same."));
        return false;
    }

    // Says goodbye if there is somebody to say it to. A second Ctrl-C does not wait for the answer.
    // What was written and not delivered is named before the end.
    int leave() {
        asked_to_leave = false;
        if (lost_ == 0) {
            terminal_.print("* saying goodbye, which may take some seconds; Ctrl-C does not wait");
            client_.post(chatsecure::Leave{});
        } else {
            client_.stop();
        }
        while (show_events()) {
            if (asked_to_leave) client_.stop();
            wait_for_input(false, -1);
        }
        return last_words(*stopped_);
    }

    Client& client_;
    Printer printer_;
    bool bell_;
    Terminal terminal_;
    std::set<std::string> others_;
    std::set<std::string> unread_;  // who has written to us alone since we last typed a line
    std::string me_, reply_to_;
    std::map<unsigned, FileEvent> moving_;
    chatsecure::NowAndThen now_and_then_;
    chatsecure::LateMessages late_;
    // The last messages of our own: each with its time and the number of its line.
    std::map<std::uint64_t, std::tuple<Line, decltype(Event::time), std::size_t>> own_;
    bool warned_ = false;   // that something would be lost
    std::size_t lost_ = 0;  // the connection, and tries to have it back that have failed
    std::optional<Stopped> stopped_;
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
    if (!std::getline(std::cin, answer)) throw Error("There was no answer.");
    return answer;
}

std::string ask_name() {
    for (;;) {
        std::string name = ask("Name: ");
        try {
            return chatsecure::fold_name(name);
        } catch (const Error& e) {
            tell(e.what());
        }
    }
}

chatsecure::SecretBytes ask_new_password(const std::string& user) {
    for (;;) {
        chatsecure::SecretBytes password =
            chatsecure::ask_password(concat("A password for ", user, ": "));
        try {
            chatsecure::check_new_password(password);
        } catch (const Error& e) {
            tell(e.what());
            continue;
        }
        if (password == chatsecure::ask_password("The same again: ")) return password;
        std::cerr << "The two are not the same.\n";
    }
}

// Fills in what the flags left open, by asking, if there is somebody to ask.
chatsecure::SecretBytes complete_sign_in(SignIn& sign_in) {
    if (sign_in.user.empty()) {
        if (!sign_in.register_account) {
            std::string choice;
            do choice = chatsecure::lower_case(ask("Log in, or register a new account? [L/r] "));
            while (choice.size() > 1 || (!choice.empty() && choice != "l" && choice != "r"));
            sign_in.register_account = choice == "r";
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
Event wait_for_login(Client& client) {
    while (std::optional<Event> event = client.next_event()) {
        if (std::holds_alternative<LoggedIn>(event->what) ||
            std::holds_alternative<Stopped>(event->what))
            return *event;
        if (const auto* unknown = std::get_if<chatsecure::ServerKeyUnknown>(&event->what)) {
            std::string answer = ask(
                concat("The server at ", visible(unknown->server),
                       " is not known yet. Its key is\n  ", unknown->fingerprint.text(),
                       "\nIs this the fingerprint that the server's operator gave you? [y/N] "));
            client.post(
                chatsecure::AcceptServerKey{answer.starts_with('y') || answer.starts_with('Y')});
        } else {
            for (const Line& line : std::visit(Describe{true}, event->what)) tell(line.text);
        }
    }
    throw Error("The client ended without a reason.");
}

bool wants_colour(bool no_colour_flag) {
    const char* terminal = std::getenv("TERM");
    return !no_colour_flag && std::getenv("NO_COLOR") == nullptr && chatsecure::is_terminal(1) &&
           terminal != nullptr && std::string_view(terminal) != "dumb";
}

cxxopts::Options make_options() {
    cxxopts::Options options("client", "The ChatSecure client for the terminal.\n");
    options.positional_help("[HOST[:PORT]]");
    auto add = options.add_options();
    auto text = [] { return cxxopts::value<std::string>(); };
    add("server", "where the server is", text()->default_value("localhost:5000"), "HOST[:PORT]");
    add("u,user", "your user name", text(), "NAME");
    add("register", "make the account first");
    add("password-file", "its first line is the password (else CHATSECURE_PASSWORD, else a prompt)",
        text(), "FILE");
    add("server-key", "the server's public key, or its fingerprint SHA256:...", text(),
        "FILE|FINGERPRINT");
    add("accept-new", "trust the key of a server that is not known yet");
    add("home", "directory of identities and pins",
        text()->default_value(chatsecure::default_home().string()), "DIR");
    add("downloads", "where received files go; made when needed",
        text()->default_value("downloads"), "DIR");
    add("auto-accept", "accept every file that is offered");
    add("max-size", "the largest file that --auto-accept accepts: 500k, 20M, 1.5G",
        text()->default_value("1G"), "SIZE");
    add("verified-room", "what you write to everybody goes to people you have verified only");
    add("wait-limit", "in scripts: how long /wait waits, and leaving for anything to move",
        text()->default_value("30"), "SECONDS");
    add("trace", "write what the program does, layer by layer, into a file (trace.txt)",
        text()->implicit_value("trace.txt"), "FILE");
    add("trace-secrets", "and the keys of this run: to look at it, not to talk in it");
    add("no-color", "no colour, also if the terminal has some");
    add("no-bell", "no bell when somebody writes to you alone, or your name");
    add("version", "print the version and exit");
    add("help", "print this and exit");
    options.parse_positional({"server"});
    return options;
}

constexpr const char* examples =
    "\nExamples:\n"
    "  ./client chat.example.org -u alice --register   make an account, and come in\n"
    "  echo '/msg bob Done.' | ./client chat.example.org -u robot --password-file secret\n"
    "\nYou type:\n";

// What a flag was given; empty if it was not.
std::string text_of(const cxxopts::ParseResult& flags, const std::string& flag) {
    return flags.count(flag) > 0 ? flags[flag].as<std::string>() : "";
}

// Throws Error for what a flag cannot be.
chatsecure::ClientOptions options_from(const cxxopts::ParseResult& flags) {
    chatsecure::HostPort server =
        chatsecure::parse_host_port(flags["server"].as<std::string>(), 5000);
    chatsecure::ClientOptions options;
    options.host = server.host;
    options.port = server.port;
    if (flags.count("home") > 0)
        options.home = chatsecure::directory_for("--home", flags["home"].as<std::string>());
    options.accept_new_server = flags.count("accept-new") > 0;
    options.verified_room = flags.count("verified-room") > 0;
    options.files.downloads =
        chatsecure::directory_for("--downloads", flags["downloads"].as<std::string>());
    options.files.auto_accept = flags.count("auto-accept") > 0;
    options.files.max_size = chatsecure::parse_size(flags["max-size"].as<std::string>());
    return options;
}
std::chrono::seconds wait_limit_from(const cxxopts::ParseResult& flags) {
    return std::chrono::seconds(chatsecure::number_for<unsigned>(
        "--wait-limit", flags["wait-limit"].as<std::string>(), 0, 1'000'000));
}

// One attempt. Nothing if the login was refused and a person may try again.
std::optional<int> chat(const cxxopts::ParseResult& flags, SignIn sign_in,
                        const chatsecure::TracerFor& trace) {
    chatsecure::ClientOptions options = options_from(flags);
    options.ask_about_server = sign_in.interactive;
    if (flags.count("server-key") > 0)
        options.server_key = chatsecure::fingerprint_from(flags["server-key"].as<std::string>());
    if (!sign_in.interactive) options.reconnect_tries = 10;
    options.password = complete_sign_in(sign_in);
    options.user = sign_in.user;
    options.trace = trace(sign_in.user);
    options.register_account = sign_in.register_account;
    options.on_event = [] { main_waker.load()->wake(); };

    Client client(std::move(options));
    if (!sign_in.interactive)
        return Script(client, wait_limit_from(flags), flags.count("auto-accept") > 0).run();
    Event first = wait_for_login(client);
    if (const auto* stopped = std::get_if<Stopped>(&first.what)) {
        int code = last_words(*stopped);
        return code == login_refused ? std::nullopt : std::optional(code);
    }
    return Conversation(client, wants_colour(flags.count("no-color") > 0),
                        flags.count("no-bell") == 0)
        .run(first);
}

int run(const cxxopts::ParseResult& flags) {
    chatsecure::Waker waker;
    main_waker = &waker;
    chatsecure::detail::AtExit forget_waker([] { main_waker = nullptr; });
    chatsecure::make_write_errors_errors();
    const SignIn given{text_of(flags, "user"), flags.count("register") > 0,
                       text_of(flags, "password-file"),
                       chatsecure::is_terminal(0) && chatsecure::is_terminal(1)};
    bool asks = given.interactive && given.password_file.empty() &&
                std::getenv("CHATSECURE_PASSWORD") == nullptr;
    const chatsecure::TracerFor trace =
        chatsecure::tracer_from(text_of(flags, "trace"), flags.count("trace-secrets") > 0);
    for (int tries = 1;; ++tries) {
        std::optional<int> code = chat(flags, given, trace);
        if (code) return *code;
        if (!asks || tries == 3) return login_refused;
        if (!given.user.empty() && !given.register_account)
            tell("If you are new here, --register makes an account.");
    }
}

}  // namespace

int main(int argc, char** argv) {
    chatsecure::open_standard_descriptors();
    argv = chatsecure::arguments_in_utf8(argc, argv);
    std::setlocale(LC_ALL, "");
    if (MB_CUR_MAX == 1 && std::setlocale(LC_CTYPE, "C.UTF-8") == nullptr)  // chat is UTF-8
        std::setlocale(LC_CTYPE, "UTF-8");  // as macOS and the BSDs call it
    cxxopts::Options options = make_options();
    int wrong = usage;  // whose trouble it is
    try {
        cxxopts::ParseResult flags = options.parse(argc, argv);
        if (!flags.unmatched().empty())
            throw Error(concat("\"", flags.unmatched()[0], "\" is one word too many."));
        if (flags.count("help") > 0) {
            std::cout << options.help() << examples;
            for (const chatsecure::CommandHelp& help : command_help)
                std::cout << row_of(help) << '\n';
            return fine;
        }
        if (flags.count("version") > 0) {
            std::cout << "ChatSecure client " << chatsecure::version << '\n';
            return fine;
        }
        options_from(flags);
        wait_limit_from(flags);
        if (std::string user = text_of(flags, "user"); !user.empty())
            chatsecure::fold_name(user);
        else if (!chatsecure::is_terminal(0))
            throw Error("Who are you? Give your user name with -u NAME.");
        wrong = trouble;
        return run(flags);
    } catch (const std::exception& e) {
        std::cerr << "client: " << e.what() << '\n';
        if (wrong == usage) std::cerr << "./client --help lists the flags.\n";
        return wrong;
    }
}
