// gui_client_fltk: ChatSecure in a window, for FLTK 1.3 and 1.4. All of the work is in
// chatsecure.hpp, chapter 12; this program draws and listens.
//
//      chatsecure::Client -- events --> Fl::awake --> App::take_events --> App::on(each event)
//                         <-- commands --------------- App::send_line, App::press
//
// Where to look:
//      Look                 colours and sizes, light and dark, in one place
//      Conversation         what was said with one person, or by everyone: the model
//      ConversationView     draw_message, draw_file: where it is drawn; handle: where clicks go
//      PeopleList           the list on the left
//      MessageInput         the keys of the input line
//      SignIn, MainWindow   the two windows: what stands where
//      App                  between the windows and the engine: events in, commands out
//
// While the windows are open nothing here waits for the network, a disk or a key: the engine's
// threads do that, and wake this one with Fl::awake.

#include "chatsecure.hpp"

#include <clocale>
#include <cmath>
#include <csignal>
#include <ctime>
#include <cxxopts.hpp>
#include <iostream>

#include <FL/Fl.H>
#include <FL/Fl_Box.H>
#include <FL/Fl_Button.H>
#include <FL/Fl_Check_Button.H>
#include <FL/Fl_Double_Window.H>
#include <FL/Fl_Group.H>
#include <FL/Fl_Input.H>
#include <FL/Fl_Menu_Button.H>
#include <FL/Fl_Multiline_Input.H>
#include <FL/Fl_Native_File_Chooser.H>
#include <FL/Fl_Secret_Input.H>
#include <FL/Fl_Slider.H>
#include <FL/filename.H>
#include <FL/fl_ask.H>
#include <FL/fl_draw.H>

namespace {

using chatsecure::concat;
using chatsecure::visible;
using Time = std::chrono::system_clock::time_point;

// ---- How it looks: set here and nowhere else ----------------------------------------------------

struct Rgb {
    unsigned char r, g, b;
    Fl_Color color() const { return fl_rgb_color(r, g, b); }
};
struct Look {
    Rgb window, panel, field, text, quiet, line, accent, on_accent, own, other, warning, online;
};
constexpr Look light_look{{255, 255, 255}, {243, 244, 246}, {255, 255, 255}, {24, 28, 34},
                          {92, 99, 112},   {216, 219, 224}, {25, 103, 210},  {255, 255, 255},
                          {214, 231, 255}, {239, 240, 243}, {186, 26, 26},   {30, 142, 62}};
constexpr Look dark_look{{24, 26, 31},    {33, 36, 42}, {43, 47, 54},    {232, 234, 237},
                         {154, 160, 172}, {64, 69, 78}, {138, 180, 248}, {16, 24, 40},
                         {38, 66, 110},   {47, 51, 59}, {255, 137, 125}, {129, 201, 149}};

bool dark = false;
const Look& look() { return dark ? dark_look : light_look; }

constexpr int text_size = 15, small_size = 12, title_size = 18, gap = 8;
constexpr int list_width = 200, details_width = 250;

// ---- Small pieces of drawing --------------------------------------------------------------------

void use_font(int size, bool bold = false) {
    fl_font(bold ? FL_HELVETICA_BOLD : FL_HELVETICA, size);
}

// A filled rectangle with round corners.
void draw_round(int x, int y, int w, int h, int radius, Rgb colour) {
    fl_color(colour.color());
    int d = 2 * std::min({radius, w / 2, h / 2});
    fl_rectf(x, y + d / 2, w, h - d);
    fl_rectf(x + d / 2, y, w - d, h);
    for (int cx : {x, x + w - d})
        for (int cy : {y, y + h - d}) fl_pie(cx, cy, d, d, 0, 360);
}

int width_of(std::string_view text) {
    return static_cast<int>(std::ceil(fl_width(text.data(), static_cast<int>(text.size()))));
}

// `text`, or as much of it as fits, with an ellipsis. In the current font.
std::string fitting(std::string_view text, int width) {
    if (width_of(text) <= width) return std::string(text);
    std::string part;
    for (std::string_view left = text; !left.empty();) {
        std::string_view before = left;
        chatsecure::take_code_point(left);
        std::string longer = part + std::string(before.substr(0, before.size() - left.size()));
        if (width_of(longer + "\u2026") > width) break;
        part = longer;
    }
    return part + "\u2026";
}
void draw_text(std::string_view text, int x, int y, int width) {
    std::string part = fitting(text, width);
    fl_draw(part.data(), static_cast<int>(part.size()), x, y);
}

// FLTK 1.3 draws Hebrew and Arabic letters from left to right. This turns each run of them (with
// the spaces between two such words) around, which is right for words and phrases; FLTK 1.4 with
// Pango does the whole of Unicode's bidirectional algorithm itself.
std::string in_drawing_order(std::string_view text) {
#if FL_MAJOR_VERSION > 1 || FL_MINOR_VERSION >= 4
    return std::string(text);
#else
    std::string out, run, spaces;  // `run` is turned around already
    auto flush = [&] {
        out += run + spaces;
        run.clear();
        spaces.clear();
    };
    while (!text.empty()) {
        std::string_view before = text;
        char32_t point = chatsecure::take_code_point(text);
        std::string letter(before.substr(0, before.size() - text.size()));
        bool leftward = (point >= 0x590 && point <= 0x8ff) ||
                        (point >= 0xfb1d && point <= 0xfdff) ||
                        (point >= 0xfe70 && point <= 0xfeff);
        if (leftward) {
            run = letter + spaces + run;
            spaces.clear();
        } else if (point == U' ' && !run.empty()) {
            spaces += letter;
        } else {
            flush();
            out += letter;
        }
    }
    flush();
    return out;
#endif
}

// Where lines of `text` begin and end, if they are at most `width` wide in the current font. Lines
// break at spaces: as many words as fit are taken, each measured once. A line whose first word
// already is too long (nothing was taken) is filled letter by letter.
struct Span {
    std::size_t begin = 0, end = 0;
};
std::vector<Span> wrap(std::string_view text, int width) {
    std::vector<Span> lines;
    std::size_t begin = 0;
    auto put_paragraph = [&](std::size_t end) {
        while (begin < end) {
            std::size_t last = begin, at = begin;  // `last`: the end of what fits, at a space
            double used = 0;
            bool full = false;
            while (at < end && !full) {
                std::size_t word_end = std::min(text.find(' ', at), end);
                // Measuring a word of 32 KiB anew for each of its lines would take long.
                bool endless = word_end - at > 1000;
                double word =
                    endless ? 0 : fl_width(text.data() + at, static_cast<int>(word_end - at));
                if (endless || used + word > width) {
                    full = true;
                } else {
                    last = word_end;
                    used += word + fl_width(" ", 1);
                    at = std::min(word_end + 1, end);
                    if (word_end == end) last = at = end;
                }
            }
            if (last == begin && full) {
                std::string_view left = text.substr(begin, end - begin);
                used = 0;
                while (!left.empty()) {
                    std::string_view before = left;
                    chatsecure::take_code_point(left);
                    std::size_t bytes = before.size() - left.size();
                    used += fl_width(before.data(), static_cast<int>(bytes));
                    if (used > width && last > begin) break;
                    last += bytes;
                }
            }
            lines.push_back({begin, last});
            begin = last;
            while (begin < end && text[begin] == ' ') ++begin;
        }
    };
    for (;;) {
        std::size_t end = std::min(text.find('\n', begin), text.size());
        if (begin == end) lines.push_back({begin, end});
        put_paragraph(end);
        if (end == text.size()) return lines;
        begin = end + 1;
    }
}

// What somebody wrote, safe to draw: line ends stay, everything else that could drive is visible.
std::string shown(std::string_view text) {
    std::string out;
    for (bool more = true; more;) {
        std::size_t end = text.find('\n');
        more = end != text.npos;
        out += visible(text.substr(0, end));
        if (more) {
            out += '\n';
            text.remove_prefix(end + 1);
        }
    }
    return out;
}

std::string clock_text(Time time) {
    std::time_t seconds = std::chrono::system_clock::to_time_t(time);
    std::tm local{};
#ifdef _WIN32
    localtime_s(&local, &seconds);
#else
    localtime_r(&seconds, &local);
#endif
    std::array<char, 16> text{};
    std::strftime(text.data(), text.size(), "%H:%M", &local);
    return text.data();
}

// After a click: the keyboard stays with whom it was, for whoever types goes on typing.
void leave_focus(Fl_Widget* before) {
    if (before != nullptr && before != Fl::focus() && before->visible_r() != 0)
        before->take_focus();
}

// A flat button with round corners. Tab reaches it, Space and Enter press it.
class Button : public Fl_Button {
  public:
    Button(int x, int y, int w, int h, const std::string& label, std::function<void()> press,
           bool important = false)
        : Fl_Button(x, y, w, h), press_(std::move(press)), important_(important) {
        copy_label(label.c_str());
        box(FL_NO_BOX);
        callback([](Fl_Widget* self, void*) { static_cast<Button*>(self)->press_(); });
    }
    void draw() override {
        const Look& l = look();
        bool strong = important_ && active_r();
        draw_round(x(), y(), w(), h(), 6,
                   Fl::focus() == this ? l.text
                   : strong            ? l.accent
                                       : l.line);
        draw_round(x() + 1, y() + 1, w() - 2, h() - 2, 5,
                   value() != 0 ? l.line
                   : strong     ? l.accent
                                : l.field);
        fl_color((!active_r() ? l.line : strong ? l.on_accent : l.text).color());
        use_font(text_size - 1);
        std::string text = fitting(label(), w() - 2 * gap);
        fl_draw(text.c_str(), x(), y(), w(), h(), FL_ALIGN_CENTER, nullptr, 0);
    }
    int handle(int event) override {
        if (event == FL_KEYBOARD && Fl::focus() == this &&
            (Fl::event_key() == FL_Enter || Fl::event_key() == FL_KP_Enter)) {
            press_();
            return 1;
        }
        Fl_Widget* focus = Fl::focus();
        int handled = Fl_Button::handle(event);
        if (event == FL_PUSH) leave_focus(focus);
        return handled;
    }

  private:
    std::function<void()> press_;
    bool important_;
};

// The keys that mean the same wherever the focus stands.
bool is_window_key() {
    int key = Fl::event_key();
    return (Fl::event_state() & (FL_CTRL | FL_COMMAND)) != 0 &&
           (key == FL_Page_Up || key == FL_Page_Down || key == 'o' || key == 'd');
}

// The one menu. It has a box, although none is drawn: FLTK opens a menu without a box with the
// right mouse button only.
class MenuButton : public Fl_Menu_Button {
  public:
    MenuButton(int x, int y, int w, int h) : Fl_Menu_Button(x, y, w, h) { box(FL_FLAT_BOX); }
    void draw() override {
        const Look& l = look();
        bool focus = Fl::focus() == this;
        draw_round(x(), y(), w(), h(), 6, focus ? l.text : l.panel);
        if (focus) draw_round(x() + 1, y() + 1, w() - 2, h() - 2, 5, l.field);
        fl_color(l.quiet.color());
        use_font(title_size);
        fl_draw("\u2261", x(), y(), w(), h(), FL_ALIGN_CENTER, nullptr, 0);
    }
    int handle(int event) override {
        Fl_Widget* focus = Fl::focus();
        int handled = Fl_Menu_Button::handle(event);
        if (event == FL_PUSH) leave_focus(focus);
        return handled;
    }
};

// ---- The model ----------------------------------------------------------------------------------

struct FileCard {
    enum class State { offered, moving, interrupted, done, stopped } state = State::offered;
    chatsecure::FileInfo file;
    std::uint64_t done = 0;
    double bytes_per_second = 0;
    std::string note;            // why it stopped
    std::filesystem::path path;  // where it is
};

struct Entry {
    enum class Kind { message, system, warning, file } kind = Kind::message;
    std::string from{}, text{};
    bool own = false;
    Time time{};
    std::uint64_t id = 0;                         // of a message of our own
    std::optional<chatsecure::Delivery> state{};  // and what has become of it
    std::string reason{};                         // for what it waits
    bool first = true;                            // of a group by one sender
    unsigned file = 0;                            // number of a FileCard
    int laid_out_for = -1;                        // the width that `lines` is for
    std::vector<Span> lines{};
    int widest = 0;  // of the lines
};

// What was said with one person, or by everyone (then the name is empty).
struct Conversation {
    static constexpr std::size_t scrollback = 10'000;  // entries: bounds the memory
    std::string name;
    std::deque<Entry> entries;
    std::size_t dropped = 0;                    // entries that are gone: entries[0] has this number
    std::map<std::uint64_t, std::size_t> open;  // our messages that go on: id, number of the entry
    unsigned unread = 0;
    bool online = false, verified = false, trusted = true, ignored = false;

    Entry& add(Entry entry) {
        if (!entries.empty()) {
            const Entry& last = entries.back();
            entry.first = last.kind != entry.kind || last.from != entry.from ||
                          entry.time - last.time > std::chrono::minutes(5);
        }
        if (entry.id != 0) open.emplace(entry.id, dropped + entries.size());
        entries.push_back(std::move(entry));
        if (entries.size() > scrollback) {
            open.erase(entries.front().id);
            entries.pop_front();
            ++dropped;
        }
        return entries.back();
    }
    // Marks a message of our own, if it is still here.
    void mark(const chatsecure::DeliveryChanged& e) {
        using enum chatsecure::Delivery;
        auto found = open.find(e.id);
        if (found == open.end()) return;
        Entry& entry = entries[found->second - dropped];
        entry.state = e.state;
        entry.reason = e.state == waiting ? visible(e.reason) : "";
        if (e.state == delivered || e.state == failed || (e.state == sent && name.empty()))
            open.erase(found);
    }
    std::string title() const { return name.empty() ? "Everyone" : name; }
};

// What stands beside a message of our own: nothing for the moment until it is known.
const char* mark_of(const std::optional<chatsecure::Delivery>& state) {
    return state ? chatsecure::delivery_mark(*state) : "";
}

enum class Action { accept, decline, cancel, open_folder };
const char* label_of(Action action) {
    switch (action) {
        case Action::accept:
            return "Accept";
        case Action::decline:
            return "Decline";
        case Action::cancel:
            return "Cancel";
        case Action::open_folder:
            return "Open folder";
    }
    return "";
}

// ---- The conversation in the middle -------------------------------------------------------------
//
// Only what is visible is ever laid out and drawn, from an anchor: the newest entry at the bottom,
// or, while somebody reads back, a certain entry at the top. So a message costs the same whether it
// is the tenth or the fifty-thousandth, and a resize re-wraps one screenful.

class ConversationView : public Fl_Group {
  public:
    struct Owner {
        std::function<const FileCard*(unsigned)> card;
        std::function<void(Action, unsigned)> act;
        std::function<void(const std::string&)> drop_files;  // addresses or paths, one a line
    };

    ConversationView(int x, int y, int w, int h, Owner owner)
        : Fl_Group(x, y, w, h),
          bar_(FL_VERT_SLIDER, x + w - bar_width, y, bar_width, h, nullptr),
          owner_(std::move(owner)) {
        end();
        box(FL_NO_BOX);
        bar_.box(FL_FLAT_BOX);
        bar_.slider(FL_FLAT_BOX);
        bar_.step(1);
        bar_.clear_visible_focus();
        bar_.callback(
            [](Fl_Widget* bar, void* self) {
                static_cast<ConversationView*>(self)->scroll_to(
                    static_cast<std::size_t>(static_cast<Fl_Slider*>(bar)->value()));
            },
            this);
    }

    void show_conversation(Conversation* conversation) {
        conversation_ = conversation;
        dropped_ = conversation->dropped;
        at_end_ = true;
        newer_ = 0;
        selecting_ = false;
        selection_.reset();
        focused_.reset();
        rows_.clear();
        places_.clear();
        redraw();
    }
    // Something was added to the conversation; perhaps its oldest entry is gone for that.
    void update() {
        if (conversation_ == nullptr) return;
        if (!at_end_) ++newer_;
        for (; dropped_ < conversation_->dropped; ++dropped_) {
            if (top_ == 0) above_ = 0;
            top_ -= std::min<std::size_t>(top_, 1);
        }
        redraw();
    }
    bool is_at_end() const { return at_end_; }

    // Where the buttons of the cards are: for the keyboard, and for tests.
    struct Place {
        Action action;
        unsigned file;
        int x, y, w, h;
    };
    const std::vector<Place>& places() const { return places_; }

    void resize(int x, int y, int w, int h) override {
        Fl_Widget::resize(x, y, w, h);
        bar_.resize(x + w - bar_width, y, bar_width, h);
    }

    void draw() override {
        const Look& l = look();
        fl_push_clip(x(), y(), w(), h());
        fl_color(l.window.color());
        fl_rectf(x(), y(), w(), h());
        places_.clear();
        rows_.clear();
        jump_ = {};
        if (conversation_ != nullptr && !conversation_->entries.empty()) draw_entries();
        if (!at_end_) draw_jump();
        fl_pop_clip();
        update_bar();
        bar_.color(l.window.color(), l.line.color());
        if (shown_ < count()) draw_child(bar_);
    }

    int handle(int event) override {
        switch (event) {
            case FL_FOCUS:
                if (focused_place() == places_.size()) move_focus(1);
                redraw();
                return 1;
            case FL_UNFOCUS:
                redraw();
                return 1;
            case FL_PUSH:
                if (Fl::event_x() >= bar_.x()) break;
                take_focus();
                return push();
            case FL_DRAG:
                if (!selecting_) break;
                drag();
                return 1;
            case FL_RELEASE:
                if (!selecting_) break;
                selecting_ = false;
                copy_selection(0);
                return 1;
            case FL_MOUSEWHEEL:
                scroll_by(Fl::event_dy() * 3 * line_height());
                return 1;
            case FL_KEYBOARD:
                if (!is_window_key() && key()) return 1;
                break;
            case FL_DND_ENTER:
            case FL_DND_DRAG:
            case FL_DND_LEAVE:
            case FL_DND_RELEASE:
                return 1;
            case FL_PASTE:
                owner_.drop_files(
                    std::string(Fl::event_text(), static_cast<std::size_t>(Fl::event_length())));
                return 1;
            default:
                break;
        }
        return Fl_Group::handle(event);
    }

    void copy_selection(int where) {  // 0: what the middle button pastes; 1: what Ctrl-V does
        std::string text = selected();
        if (!text.empty()) Fl::copy(text.data(), static_cast<int>(text.size()), where);
    }
    void scroll_pages(int pages) { scroll_by(pages * (h() - 2 * line_height())); }

  private:
    static constexpr int bar_width = 10, padding = 10;

    // A line of text as it was drawn: what a mouse can point at.
    struct Row {
        std::size_t entry;  // counted from the first ever
        std::size_t begin, end;
        int x, y, h;
    };
    struct Point {
        std::size_t entry = 0, at = 0;
        friend auto operator<=>(const Point&, const Point&) = default;
    };

    static int line_height() { return text_size + 6; }
    std::size_t count() const {
        return conversation_ == nullptr ? 0 : conversation_->entries.size();
    }
    int inner() const { return w() - bar_width - 2 * gap; }
    int bubble_width() const { return std::max(inner() * 4 / 5 - 2 * padding, 80); }

    // ---- Layout ---------------------------------------------------------------------------------

    int height_of(Entry& entry) {
        if (entry.kind == Entry::Kind::file) return card_height(owner_.card(entry.file)) + gap;
        bool message = entry.kind == Entry::Kind::message;
        int width = message ? bubble_width() : inner() - 2 * padding;
        if (entry.laid_out_for != width) {
            use_font(message ? text_size : small_size);
            entry.lines = wrap(entry.text, width);
            entry.laid_out_for = width;
            entry.widest = 0;
            for (const Span& line : entry.lines)
                entry.widest = std::max(entry.widest, width_of(part(entry, line)));
        }
        int lines = static_cast<int>(entry.lines.size());
        if (!message) return lines * (small_size + 5) + 6;
        return lines * line_height() + padding + (entry.first ? small_size + 10 : 0) + 3;
    }

    // Sets the anchor, top_ and above_: where it was left, or so that the newest is at the bottom.
    void find_top() {
        if (!at_end_) {
            top_ = std::min(top_, count() - 1);
            return;
        }
        int room = h() - gap;
        top_ = count();
        while (top_ > 0 && room > 0) room -= height_of(conversation_->entries[--top_]);
        above_ = std::max(-room, 0);
        lead_ = std::max(room, 0);  // fewer entries than fit: they stand at the bottom
    }

    void draw_entries() {
        find_top();
        int at = y() + (at_end_ ? lead_ - above_ : -above_);
        shown_ = 0;
        for (std::size_t i = top_; i < count() && at < y() + h(); ++i, ++shown_) {
            Entry& entry = conversation_->entries[i];
            int height = height_of(entry);
            if (entry.kind == Entry::Kind::file)
                draw_file(entry, at);
            else if (entry.kind == Entry::Kind::message)
                draw_message(entry, i + conversation_->dropped, at);
            else
                draw_system(entry, i + conversation_->dropped, at);
            at += height;
        }
        if (!at_end_ && top_ + shown_ == count() && at <= y() + h()) {  // read to the end
            at_end_ = true;
            newer_ = 0;
        }
    }

    void draw_message(const Entry& entry, std::size_t number, int at) {
        const Look& l = look();
        int wide = std::min(entry.widest, bubble_width());
        int left = entry.own ? x() + gap + inner() - wide - 2 * padding : x() + gap;
        if (entry.first) {
            fl_color(l.quiet.color());
            use_font(small_size, true);
            std::string head = concat(entry.own ? "You" : entry.from, "  ", clock_text(entry.time));
            int head_x = entry.own ? x() + gap + inner() - width_of(head) : left + 2;
            draw_text(head, head_x, at + small_size + 6, inner());
            at += small_size + 10;
        }
        // X11 counts pixels in 16 bits: what is far outside must not be drawn, or it is seen here.
        int bottom = at + static_cast<int>(entry.lines.size()) * line_height() + padding;
        int from = std::max(at, y() - 2 * line_height());
        int to = std::min(bottom, y() + h() + 2 * line_height());
        draw_round(left, from, wide + 2 * padding, to - from, 9, entry.own ? l.own : l.other);
        if (entry.own && bottom < y() + h() + line_height()) draw_mark(entry, left, bottom);
        use_font(text_size);
        draw_lines(entry, number, left + padding, at + padding / 2, line_height(), l.text);
    }

    // To the left of the bubble, at its last line; with the reason, if there is room.
    void draw_mark(const Entry& entry, int right, int bottom) {
        using enum chatsecure::Delivery;
        use_font(small_size, entry.state == failed);
        fl_color((entry.state == failed ? look().warning : look().quiet).color());
        std::string text = mark_of(entry.state);
        std::string all = entry.reason.empty() ? text : concat(text, " ", entry.reason);
        if (width_of(all) < right - x() - 2 * gap) text = all;
        fl_draw(text.c_str(), right - width_of(text) - 6, bottom - padding / 2 - 5);
    }

    void draw_system(const Entry& entry, std::size_t number, int at) {
        const Look& l = look();
        use_font(small_size);
        draw_lines(entry, number, x() + gap + padding, at + 3, small_size + 5,
                   entry.kind == Entry::Kind::warning ? l.warning : l.quiet);
    }

    static std::string_view part(const Entry& entry, const Span& line) {
        return std::string_view(entry.text).substr(line.begin, line.end - line.begin);
    }

    void draw_lines(const Entry& entry, std::size_t number, int left, int at, int step,
                    Rgb colour) {
        int above = std::max((y() - at) / step, 0);  // lines that are not seen
        auto first = std::min(static_cast<std::size_t>(above), entry.lines.size());
        at += static_cast<int>(first) * step;
        for (std::size_t i = first; i < entry.lines.size() && at < y() + h(); ++i) {
            const Span& line = entry.lines[i];
            std::string_view text = part(entry, line);
            draw_selection(number, line, text, left, at, step);
            fl_color(colour.color());
            std::string drawn = in_drawing_order(text);
            fl_draw(drawn.data(), static_cast<int>(drawn.size()), left,
                    at + step - fl_descent() - 2);
            rows_.push_back({number, line.begin, line.end, left, at, step});
            at += step;
        }
    }

    void draw_selection(std::size_t number, const Span& line, std::string_view text, int left,
                        int at, int step) {
        if (!selection_) return;
        auto [from, to] = std::minmax(selection_->first, selection_->second);
        Point begin{number, line.begin}, end{number, line.end};
        if (to <= begin || from >= end) return;
        std::size_t first = from > begin ? from.at - line.begin : 0;
        std::size_t last = to < end ? to.at - line.begin : text.size();
        fl_color(look().accent.color());
        int offset = width_of(text.substr(0, first));
        int wide = width_of(text.substr(first, last - first));
        draw_round(left + offset, at, wide, step, 3, dark ? Rgb{70, 96, 140} : Rgb{168, 199, 250});
    }

    static int card_height(const FileCard* card) {
        return card == nullptr || actions_of(*card).empty() ? 52 : 96;
    }
    void draw_file(const Entry& entry, int at) {
        const FileCard* card = owner_.card(entry.file);
        if (card == nullptr) return;
        const Look& l = look();
        int wide = std::min(inner(), 440);
        int left = card->file.sending ? x() + gap + inner() - wide : x() + gap;
        int high = card_height(card);
        draw_round(left, at, wide, high, 9, l.line);
        draw_round(left + 1, at + 1, wide - 2, high - 2, 8, l.panel);
        int text_width = wide - 2 * padding;
        fl_color(l.text.color());
        use_font(text_size, true);
        draw_text(chatsecure::visible(card->file.name), left + padding, at + 22, text_width);
        use_font(small_size);
        fl_color((card->state == FileCard::State::stopped ? l.warning : l.quiet).color());
        draw_text(describe(*card), left + padding, at + 40, text_width);
        if (card->state == FileCard::State::moving || card->state == FileCard::State::interrupted) {
            double share = static_cast<double>(card->done) /
                           static_cast<double>(std::max<std::uint64_t>(card->file.size, 1));
            draw_round(left + padding, at + 48, text_width, 8, 4, l.line);
            int full = static_cast<int>(share * text_width);
            if (full > 4) draw_round(left + padding, at + 48, full, 8, 4, l.accent);
        }
        int button_x = left + padding;
        for (Action action : actions_of(*card)) draw_action(action, entry.file, button_x, at + 62);
    }

    static std::vector<Action> actions_of(const FileCard& card) {
        switch (card.state) {
            case FileCard::State::offered:
                if (!card.file.sending) return {Action::accept, Action::decline};
                return {Action::cancel};
            case FileCard::State::moving:
            case FileCard::State::interrupted:
                return {Action::cancel};
            case FileCard::State::done:
                if (!card.file.sending) return {Action::open_folder};
                return {};
            case FileCard::State::stopped:
                return {};
        }
        return {};
    }

    static std::string describe(const FileCard& card) {
        using chatsecure::readable_size;
        std::string size = readable_size(card.file.size);
        switch (card.state) {
            case FileCard::State::offered:
                return card.file.sending ? concat(size, " \u00b7 waits for ", card.file.user)
                                         : concat(card.file.user, " offers a file \u00b7 ", size);
            case FileCard::State::moving: {
                if (card.bytes_per_second < 1) return size;
                auto rate = static_cast<std::uint64_t>(card.bytes_per_second);
                return concat(
                    readable_size(card.done), " of ", size, " \u00b7 ", readable_size(rate),
                    "/s \u00b7 ",
                    chatsecure::time_left(card.file.size - card.done, card.bytes_per_second));
            }
            case FileCard::State::interrupted:
            case FileCard::State::stopped:
                return concat(size, " \u00b7 ", chatsecure::visible(card.note));
            case FileCard::State::done:
                return card.file.sending
                           ? concat(size, " \u00b7 has arrived")
                           : concat(size, " \u00b7 ", chatsecure::visible(card.path.string()));
        }
        return size;
    }

    void draw_action(Action action, unsigned file, int& button_x, int at) {
        const Look& l = look();
        use_font(small_size, true);
        int wide = width_of(label_of(action)) + 24, high = 26;
        bool focus = Fl::focus() == this && focused_ == std::pair(action, file);
        bool strong = action == Action::accept;
        draw_round(button_x, at, wide, high, 6, focus ? l.text : strong ? l.accent : l.line);
        draw_round(button_x + 1, at + 1, wide - 2, high - 2, 5, strong ? l.accent : l.field);
        fl_color((strong ? l.on_accent : l.text).color());
        fl_draw(label_of(action), button_x + 12, at + 17);
        places_.push_back({action, file, button_x, at, wide, high});
        button_x += wide + gap;
    }

    // "Newest": while somebody reads back.
    void draw_jump() {
        use_font(small_size, true);
        std::string text = newer_ > 0 ? concat("\u2193  ", newer_, " new") : "\u2193  Newest";
        int wide = width_of(text) + 24, high = 28;
        jump_ = {x() + w() - bar_width - wide - gap, y() + h() - high - gap, wide, high};
        draw_round(jump_.x, jump_.y, wide, high, 14, look().accent);
        fl_color(look().on_accent.color());
        fl_draw(text.c_str(), jump_.x + 12, jump_.y + 18);
    }

    // ---- Scrolling ------------------------------------------------------------------------------

    void update_bar() {
        double total = static_cast<double>(std::max<std::size_t>(count(), 1));
        double seen = static_cast<double>(std::max<std::size_t>(shown_, 1));
        bar_.slider_size(std::max(seen / total, 0.05));
        bar_.range(0, std::max(total - seen, 0.0));
        bar_.value(static_cast<double>(top_));
    }
    void scroll_to(std::size_t entry) {
        if (count() == 0) return;
        at_end_ = entry + shown_ >= count() && entry > top_;
        top_ = std::min(entry, count() - 1);
        above_ = 0;
        redraw();
    }
    void scroll_by(int pixels) {
        if (count() == 0) return;
        find_top();
        if (at_end_ && (pixels > 0 || lead_ > 0)) return;
        at_end_ = false;
        above_ += pixels;
        while (above_ < 0 && top_ > 0) above_ += height_of(conversation_->entries[--top_]);
        above_ = std::max(above_, 0);
        while (top_ + 1 < count() && above_ >= height_of(conversation_->entries[top_]))
            above_ -= height_of(conversation_->entries[top_++]);
        redraw();
    }
    void jump_to_end() {
        at_end_ = true;
        newer_ = 0;
        redraw();
    }

    // ---- Mouse and keys -------------------------------------------------------------------------

    int push() {
        int mx = Fl::event_x(), my = Fl::event_y();
        auto inside = [&](int px, int py, int pw, int ph) {
            return mx >= px && mx < px + pw && my >= py && my < py + ph;
        };
        if (!at_end_ && inside(jump_.x, jump_.y, jump_.w, jump_.h)) {
            jump_to_end();
            return 1;
        }
        for (const Place& place : places_)
            if (inside(place.x, place.y, place.w, place.h)) {
                owner_.act(place.action, place.file);
                return 1;
            }
        Point point = point_at(mx, my);
        selection_ = {point, point};
        selecting_ = true;
        redraw();
        return 1;
    }
    void drag() {
        selection_->second = point_at(Fl::event_x(), Fl::event_y());
        redraw();
    }

    // The place in the text that is nearest to a point of the window.
    Point point_at(int mx, int my) const {
        const Row* best = nullptr;
        for (const Row& row : rows_)  // as drawn last: the oldest may have gone since
            if (row.entry >= conversation_->dropped && (best == nullptr || my >= row.y))
                best = &row;
        if (best == nullptr) return {};
        const Entry& entry = conversation_->entries[best->entry - conversation_->dropped];
        use_font(entry.kind == Entry::Kind::message ? text_size : small_size);
        std::string_view text = part(entry, {best->begin, best->end});
        std::size_t at = 0;
        for (std::string_view left = text; !left.empty() && my < best->y + best->h;) {
            std::string_view before = left;
            chatsecure::take_code_point(left);
            std::size_t next = at + before.size() - left.size();
            int middle = (width_of(text.substr(0, at)) + width_of(text.substr(0, next))) / 2;
            if (mx < best->x + middle) return {best->entry, best->begin + at};
            at = next;
        }
        return {best->entry, my < best->y + best->h ? best->begin + at : best->end};
    }

    std::string selected() const {
        std::string text;
        if (!selection_ || conversation_ == nullptr) return text;
        auto [from, to] = std::minmax(selection_->first, selection_->second);
        for (std::size_t n = std::max(from.entry, conversation_->dropped);
             n <= to.entry && n - conversation_->dropped < count(); ++n) {
            const Entry& entry = conversation_->entries[n - conversation_->dropped];
            std::size_t begin = n == from.entry ? from.at : 0;
            std::size_t end = n == to.entry ? to.at : entry.text.size();
            if (!text.empty()) text += '\n';
            text += entry.text.substr(begin, end - begin);
        }
        return text;
    }

    bool key() {
        switch (Fl::event_key()) {
            case FL_Up:
                scroll_by(-2 * line_height());
                return true;
            case FL_Down:
                scroll_by(2 * line_height());
                return true;
            case FL_Page_Up:
                scroll_pages(-1);
                return true;
            case FL_Page_Down:
                scroll_pages(1);
                return true;
            case FL_Home:
                scroll_to(0);
                return true;
            case FL_End:
                jump_to_end();
                return true;
            case FL_Left:
                move_focus(-1);
                return true;
            case FL_Right:
                move_focus(1);
                return true;
            case FL_Enter:
            case FL_KP_Enter:
            case ' ':
                if (focused_place() == places_.size()) return false;
                owner_.act(focused_->first, focused_->second);
                return true;
            case 'c':
                if (!Fl::event_command()) return false;
                copy_selection(1);
                return true;
            default:
                return false;
        }
    }

    // The button that Enter presses: it is known by its card, not by its place, because cards come
    // and go, and nobody shall accept a file by pressing Enter for another one.
    std::size_t focused_place() const {  // places_.size(): none that can be seen
        auto found = std::find_if(places_.begin(), places_.end(), [&](const Place& place) {
            return focused_ == std::pair(place.action, place.file);
        });
        return static_cast<std::size_t>(found - places_.begin());
    }
    void move_focus(int by) {
        std::size_t n = places_.size(), at = focused_place();
        if (n == 0) return;
        if (at == n)
            at = by > 0 ? 0 : n - 1;
        else
            at = (at + (by > 0 ? 1 : n - 1)) % n;
        focused_ = {places_[at].action, places_[at].file};
        redraw();
    }

    Fl_Slider bar_;
    Owner owner_;
    Conversation* conversation_ = nullptr;
    bool at_end_ = true;       // then the two that follow are computed anew at each drawing
    std::size_t top_ = 0;      // the entry at the top, counted from the oldest that is there
    int above_ = 0;            // pixels of it that are above the edge
    int lead_ = 0;             // pixels that are free above the first entry
    std::size_t dropped_ = 0;  // of the conversation, when top_ was right
    std::size_t shown_ = 0;    // entries that were drawn
    unsigned newer_ = 0;       // entries that came while reading back
    struct {
        int x = 0, y = 0, w = 0, h = 0;
    } jump_;
    std::vector<Row> rows_;
    std::vector<Place> places_;
    std::optional<std::pair<Action, unsigned>> focused_;
    std::optional<std::pair<Point, Point>> selection_;
    bool selecting_ = false;
};

// ---- The list on the left -----------------------------------------------------------------------

class PeopleList : public Fl_Widget {
  public:
    struct Owner {
        std::function<std::vector<const Conversation*>()> rows;
        std::function<std::string()> current;
        std::function<void(const std::string&)> choose;
    };
    PeopleList(int x, int y, int w, int h, Owner owner)
        : Fl_Widget(x, y, w, h), owner_(std::move(owner)) {}

    static constexpr int row_height = 38;

    void draw() override {
        const Look& l = look();
        fl_push_clip(x(), y(), w(), h());
        fl_color(l.panel.color());
        fl_rectf(x(), y(), w(), h());
        int at = y() + gap - scroll_;
        for (const Conversation* c : owner_.rows()) {
            if (at + row_height > y() && at < y() + h()) draw_row(*c, at);
            at += row_height;
        }
        fl_pop_clip();
    }

    int handle(int event) override {
        std::vector<const Conversation*> rows = owner_.rows();
        switch (event) {
            case FL_FOCUS:
            case FL_UNFOCUS:
                redraw();
                return 1;
            case FL_PUSH: {
                take_focus();
                int row = (Fl::event_y() - y() - gap + scroll_) / row_height;
                if (row >= 0 && static_cast<std::size_t>(row) < rows.size())
                    owner_.choose(rows[static_cast<std::size_t>(row)]->name);
                return 1;
            }
            case FL_MOUSEWHEEL: {
                int all = static_cast<int>(rows.size()) * row_height + 2 * gap;
                scroll_ =
                    std::clamp(scroll_ + Fl::event_dy() * row_height, 0, std::max(all - h(), 0));
                redraw();
                return 1;
            }
            case FL_KEYBOARD:
                if (Fl::event_key() != FL_Up && Fl::event_key() != FL_Down) return 0;
                step(Fl::event_key() == FL_Down ? 1 : -1);
                return 1;
            default:
                return Fl_Widget::handle(event);
        }
    }

    // Chooses the next conversation, or the one before.
    void step(int by) {
        std::vector<const Conversation*> rows = owner_.rows();
        int row = 0, count = static_cast<int>(rows.size());
        while (row < count && rows[static_cast<std::size_t>(row)]->name != owner_.current()) ++row;
        row = std::clamp(row + by, 0, count - 1);
        scroll_ = std::clamp(scroll_, std::max((row + 1) * row_height + 2 * gap - h(), 0),
                             row * row_height);
        owner_.choose(rows[static_cast<std::size_t>(row)]->name);
    }

  private:
    void draw_row(const Conversation& c, int at) {
        const Look& l = look();
        bool current = c.name == owner_.current();
        if (current)
            draw_round(x() + 4, at + 1, w() - 8, row_height - 2, 7,
                       Fl::focus() == this ? l.accent : l.own);
        Rgb colour = current && Fl::focus() == this ? l.on_accent : l.text;
        int left = x() + 16;
        if (!c.name.empty()) {
            fl_color((c.online ? l.online : l.line).color());
            fl_pie(left, at + row_height / 2 - 4, 9, 9, 0, 360);
        }
        left += 18;
        int right = x() + w() - 14;
        if (c.unread > 0) {
            use_font(small_size, true);
            std::string number = c.unread > 99 ? "99+" : std::to_string(c.unread);
            int wide = std::max(width_of(number) + 12, 22);
            right -= wide;
            draw_round(right, at + 9, wide, 20, 10, l.accent);
            fl_color(l.on_accent.color());
            fl_draw(number.c_str(), right, at + 9, wide, 20, FL_ALIGN_CENTER, nullptr, 0);
        }
        if (c.verified && c.trusted) {
            use_font(text_size, true);
            right -= 18;
            fl_color((current ? colour : l.online).color());
            fl_draw("\u2713", right + 2, at + 24);
        }
        if (!c.trusted) {
            use_font(text_size, true);
            right -= 16;
            fl_color(l.warning.color());
            fl_draw("!", right + 4, at + 24);
        }
        use_font(text_size, c.unread > 0 || c.name.empty());
        fl_color((c.online || c.name.empty() || current ? colour : l.quiet).color());
        draw_text(c.title(), left, at + 24, right - left - 4);
    }

    Owner owner_;
    int scroll_ = 0;
};

// ---- The input line -----------------------------------------------------------------------------

class MessageInput : public Fl_Multiline_Input {
  public:
    struct Owner {
        std::function<bool(const std::string&)> send;  // false: not taken, so it stays here
        std::function<void()> resized;
        std::function<std::vector<std::string>(const std::string& word, bool is_first)> complete;
        std::function<void(int)> scroll;
        std::function<void(const std::string&)> drop_files;
    };
    MessageInput(int x, int y, int w, int h, Owner owner)
        : Fl_Multiline_Input(x, y, w, h), owner_(std::move(owner)) {
        wrap(1);
        textsize(text_size);
        maximum_size(2 * static_cast<int>(chatsecure::max_text_bytes));  // more: a sentence says so
        tab_nav(1);
        when(FL_WHEN_CHANGED);
        callback(
            [](Fl_Widget* self, void*) { static_cast<MessageInput*>(self)->owner_.resized(); });
    }

    // How high it wants to be: one line to six.
    int wanted_height() const {
        use_font(text_size);
        auto lines = static_cast<int>(::wrap(value(), std::max(w() - 24, 40)).size());
        return std::clamp(lines, 1, 6) * (fl_height() + 1) + 14;
    }

    int handle(int event) override {
        if (event == FL_KEYBOARD && is_window_key()) return 0;
        if (event == FL_KEYBOARD && key()) return 1;
        if (event == FL_DND_RELEASE) dropping_ = true;  // FL_PASTE follows, with what was dropped
        if (event == FL_PASTE && std::exchange(dropping_, false)) {
            std::string text(Fl::event_text(), static_cast<std::size_t>(Fl::event_length()));
            if (text.starts_with("file://")) {
                owner_.drop_files(text);
                return 1;
            }
        }
        return Fl_Multiline_Input::handle(event);
    }

  private:
    bool key() {
        bool shift = (Fl::event_state() & FL_SHIFT) != 0;
        switch (Fl::event_key()) {
            case FL_Enter:
            case FL_KP_Enter:
                if (shift) {
                    replace(cursor(), mark(), "\n", 1);
                    owner_.resized();
                } else {
                    send();
                }
                return true;
            case FL_Up:
                if (std::string_view(value()).substr(0, std::size_t(cursor())).find('\n') !=
                    std::string_view::npos)
                    return false;
                recall(-1);
                return true;
            case FL_Down:
                if (at_ == history_.size()) return false;
                recall(1);
                return true;
            case FL_Page_Up:
            case FL_Page_Down:
                owner_.scroll(Fl::event_key() == FL_Page_Up ? -1 : 1);
                return true;
            case FL_Tab:
                return !shift && complete();
            default:
                return false;
        }
    }

    void send() {
        std::string text(value());
        if (text.find_first_not_of(" \n") == text.npos) return;
        if (history_.empty() || history_.back() != text) history_.push_back(text);
        if (history_.size() > 200) history_.pop_front();
        at_ = history_.size();
        if (!owner_.send(text)) return;
        value("");
        owner_.resized();
    }

    void recall(int by) {
        if (by < 0 && at_ == 0) return;
        if (at_ == history_.size()) draft_ = value();
        at_ = by < 0 ? at_ - 1 : at_ + 1;
        value((at_ < history_.size() ? history_[at_] : draft_).c_str());
        cursor(size());
        owner_.resized();
    }

    // Completes the word before the cursor, if it can be. False if there is none: then Tab moves
    // on.
    bool complete() {
        std::string before(value(), static_cast<std::size_t>(cursor()));
        std::size_t space = before.find_last_of(" \n");
        std::string word = before.substr(space == before.npos ? 0 : space + 1);
        if (word.empty()) return false;
        std::vector<std::string> found = owner_.complete(word, word.size() == before.size());
        if (found.empty()) return true;
        std::string common = found[0];
        for (const std::string& other : found)
            common.erase(
                std::mismatch(common.begin(), common.end(), other.begin(), other.end()).first,
                common.end());
        if (found.size() == 1) common += ' ';
        insert(common.substr(word.size()).c_str());
        owner_.resized();
        return true;
    }

    // FLTK 1.4 has another name for it.
#if FL_MAJOR_VERSION == 1 && FL_MINOR_VERSION < 4
    int cursor() const { return position(); }
    void cursor(int at) { position(at); }
#else
    int cursor() const { return insert_position(); }
    void cursor(int at) { insert_position(at); }
#endif

    Owner owner_;
    bool dropping_ = false;
    std::deque<std::string> history_;
    std::size_t at_ = 0;  // which of them is shown; the number of them: the draft
    std::string draft_;
};

// ---- Helpers for the two windows ----------------------------------------------------------------

// A text in a colour of the Look, which wraps.
class Text : public Fl_Widget {
  public:
    Text(int x, int y, int w, int h, int size, Rgb Look::*colour, bool bold = false)
        : Fl_Widget(x, y, w, h), size_(size), colour_(colour), bold_(bold) {}
    void set(const std::string& text) {
        if (text == text_) return;
        text_ = text;
        if (window() != nullptr) window()->redraw();
    }
    const std::string& get() const { return text_; }
    void set_colour(Rgb Look::*colour) { colour_ = colour; }
    // How high it is at its width.
    int wanted_height() const {
        use_font(size_, bold_);
        return static_cast<int>(::wrap(text_, w()).size()) * (size_ + 5);
    }
    void draw() override {
        fl_push_clip(x(), y(), w(), h());
        use_font(size_, bold_);
        fl_color((look().*colour_).color());
        int at = y() + size_ + 1;
        for (const Span& line : ::wrap(text_, w())) {
            fl_draw(text_.data() + line.begin, static_cast<int>(line.end - line.begin), x(), at);
            at += size_ + 5;
        }
        fl_pop_clip();
    }

  private:
    std::string text_;
    int size_;
    Rgb Look::*colour_;
    bool bold_;
};

// The box of a field: flat, with round corners and a thin line.
constexpr Fl_Boxtype field_box = FL_FREE_BOXTYPE;
void draw_field_box(int x, int y, int w, int h, Fl_Color colour) {
    unsigned char r = 0, g = 0, b = 0;
    Fl::get_color(colour, r, g, b);
    bool check = h < 20;  // the box of a check mark
    int radius = check ? 3 : 6;
    draw_round(x, y, w, h, radius, check ? look().quiet : look().line);
    draw_round(x + 1, y + 1, w - 2, h - 2, radius - 1, {r, g, b});
}

// Gives the widgets of FLTK itself the colours of the Look.
void dress(Fl_Widget& widget) {
    const Look& l = look();
    if (auto* input = dynamic_cast<Fl_Input_*>(&widget)) {
        input->box(field_box);
        input->color(l.field.color(), l.accent.color());
        input->textcolor(l.text.color());
        input->cursor_color(l.text.color());
    }
    widget.labelcolor(l.text.color());
    if (auto* group = widget.as_group()) {
        for (int i = 0; i < group->children(); ++i) {
            Fl_Widget& child = *group->child(i);
            if (child.as_group() != nullptr && child.as_window() == nullptr &&
                dynamic_cast<Fl_Input_*>(&child) == nullptr)
                child.color(group->color());
            dress(child);
        }
    }
}

// And those that FLTK draws by itself: menus, check marks, the file chooser.
void dress_toolkit() {
    const Look& l = look();
    auto [r, g, b] = l.panel;
    Fl::background(r, g, b);
    auto [r2, g2, b2] = l.field;
    Fl::background2(r2, g2, b2);
    auto [r3, g3, b3] = l.text;
    Fl::foreground(r3, g3, b3);
    auto [r4, g4, b4] = l.accent;
    Fl::set_color(FL_SELECTION_COLOR, r4, g4, b4);
}

// Asks in a window before `parent`; what goes on behind it goes on. Enter and Escape mean `no`.
bool ask(const Fl_Window& parent, const std::string& question, const char* yes, const char* no) {
    const int width = 400, height = 130;
    bool answer = false;
    Fl_Double_Window window(parent.x() + (parent.w() - width) / 2,
                            parent.y() + (parent.h() - height) / 2, width, height, "ChatSecure");
    Text text(20, 20, width - 40, 50, text_size, &Look::text);
    Button yes_button(width - 240, height - 50, 105, 34, yes, [&] {
        answer = true;
        window.hide();
    });
    Button no_button(
        width - 125, height - 50, 105, 34, no, [&] { window.hide(); }, true);
    window.end();
    text.set(question);
    window.color(look().panel.color());
    window.set_modal();
    window.show();
    no_button.take_focus();
    while (window.shown() != 0) Fl::wait();
    return answer;
}

// The 60 digits of a safety number, four groups of five to a line.
std::string grouped(const std::string& digits) {
    std::string text;
    std::size_t group = 0;
    for (const std::string& word : chatsecure::split_words(digits)) {
        if (group > 0) text += group % 4 == 0 ? "\n" : "  ";
        text += word;
        ++group;
    }
    return text;
}
// A fingerprint in pieces that an eye can compare.
std::string grouped(const chatsecure::Fingerprint& fingerprint) {
    std::string text = fingerprint.text(), out = "SHA256:\n";
    text.erase(0, 7);
    for (std::size_t i = 0; i < text.size(); i += 8)
        out += concat(i == 0 ? "" : i % 16 == 0 ? "\n" : "  ", text.substr(i, 8));
    return out;
}

// ---- Signing in ---------------------------------------------------------------------------------

struct SignInForm {
    std::string server, user;
    chatsecure::SecretBytes password;
    bool register_account = false;
};

class SignIn : public Fl_Double_Window {
  public:
    struct Owner {
        std::function<void(const SignInForm&)> submit;
        std::function<void(bool)> answer_key;
        std::function<void()> close, drawn;
    };

    explicit SignIn(Owner owner)
        : Fl_Double_Window(420, base_height, "ChatSecure"), owner_(std::move(owner)) {
        title_.set("ChatSecure");
        label_server_.set("Server");
        label_name_.set("Name");
        label_password_.set("Password");
        key_title_.set(
            "This server is not known yet. Compare its fingerprint with the one that its operator "
            "gave you:");
        password_.when(FL_WHEN_ENTER_KEY_ALWAYS);
        password_.callback([](Fl_Widget*, void* self) { static_cast<SignIn*>(self)->submit(); },
                           this);
        show_password_.labelsize(small_size);
        show_password_.callback(
            [](Fl_Widget* check, void* field) {
                bool show = static_cast<Fl_Check_Button*>(check)->value() != 0;
                auto* password = static_cast<Fl_Secret_Input*>(field);
                password->input_type(show ? FL_NORMAL_INPUT : FL_SECRET_INPUT);
                password->redraw();
            },
            &password_);
        end();
        callback([](Fl_Widget*, void* self) { static_cast<SignIn*>(self)->owner_.close(); }, this);
        show_key(std::nullopt);
        show_warning("");
        redress();
    }

    void fill(const SignInForm& form) {
        server_.value(form.server.c_str());
        name_.value(form.user.c_str());
        password_.value(reinterpret_cast<const char*>(form.password.data()),
                        static_cast<int>(form.password.size()));
        register_.value(form.register_account ? 1 : 0);
        if (form.user.empty())
            name_.take_focus();
        else
            password_.take_focus();
    }
    void forget_password() {  // value() is the field's own buffer
        OPENSSL_cleanse(const_cast<char*>(password_.value()),
                        static_cast<std::size_t>(password_.size()));
        password_.value("");
    }
    void redress() {
        color(look().window.color());
        dress(*this);
        redraw();
    }

    // What the engine is doing; while it does, the form waits.
    void set_busy(const std::string& what) {
        status_.set(what);
        bool busy = !what.empty();
        for (Fl_Widget* field : std::initializer_list<Fl_Widget*>{
                 &server_, &name_, &password_, &show_password_, &register_, &enter_})
            busy ? field->deactivate() : field->activate();
        if (busy) {
            clear_errors();
            dots_ = 0;
            Fl::remove_timeout(&SignIn::tick, this);
            Fl::add_timeout(0.4, &SignIn::tick, this);
        }
        redraw();
    }
    void clear_errors() {
        for (Text* error : {&server_error_, &name_error_, &password_error_}) error->set("");
        show_warning("");
        show_key(std::nullopt);
    }
    enum class Field { server, name, password };
    void show_error(Field field, const std::string& sentence) {
        set_busy("");
        Text& beside = field == Field::server ? server_error_
                       : field == Field::name ? name_error_
                                              : password_error_;
        beside.set(sentence);
        if (beside.wanted_height() > beside.h()) {  // a long one gets the room that it needs
            beside.set("");
            show_warning(sentence);
        }
        if (field == Field::password) password_.take_focus();
    }
    // First contact: shows the fingerprint, and asks.
    void show_key(const std::optional<chatsecure::Fingerprint>& key) {
        for (Fl_Widget* part :
             std::initializer_list<Fl_Widget*>{&key_title_, &key_, &accept_, &refuse_})
            key ? part->show() : part->hide();
        if (!key) return;
        status_.set("");
        key_.set(grouped(*key));
        refuse_.take_focus();
        redraw();
    }
    // What must not be overlooked.
    void show_warning(const std::string& text) {
        warning_.set(text);
        if (!text.empty()) show_key(std::nullopt);
        use_font(small_size, true);
        int lines = text.empty() ? 0 : static_cast<int>(::wrap(text, w() - 48).size());
        size(w(), std::max(base_height, 400 + lines * (small_size + 4)));  // all of it is seen
        redraw();
    }

    void draw() override {
        Fl_Double_Window::draw();
        owner_.drawn();
        if (warning_.get().empty()) return;
        draw_round(12, 372, w() - 24, h() - 384, 8, look().warning);
        draw_round(14, 374, w() - 28, h() - 388, 7, look().window);
        fl_push_clip(22, 380, w() - 44, h() - 398);
        use_font(small_size, true);
        fl_color(look().warning.color());
        int at = 394;
        for (const Span& line : ::wrap(warning_.get(), w() - 48)) {
            fl_draw(warning_.get().data() + line.begin, static_cast<int>(line.end - line.begin), 24,
                    at);
            at += small_size + 4;
        }
        fl_pop_clip();
    }

    struct Place {
        const char* name;
        const Fl_Widget* widget;
    };
    std::vector<Place> places() const {
        return {{"server", &server_},     {"name", &name_},   {"password", &password_},
                {"register", &register_}, {"enter", &enter_}, {"accept-key", &accept_},
                {"refuse-key", &refuse_}};
    }

  private:
    static constexpr int base_height = 560;
    void submit() {
        if (enter_.active() == 0) return;
        clear_errors();
        SignInForm form{server_.value(), name_.value(), chatsecure::to_secret(password_.value()),
                        register_.value() != 0};
        if (form.server.empty()) return show_error(Field::server, "Where is the server?");
        if (form.user.empty()) return show_error(Field::name, "Who are you?");
        if (form.password.empty()) return show_error(Field::password, "The password is missing.");
        owner_.submit(form);
    }
    // The busy indication.
    static void tick(void* data) {
        auto* self = static_cast<SignIn*>(data);
        if (self->status_.get().empty() || self->enter_.active() != 0) return;
        std::string text = self->status_.get();
        text.erase(std::min(text.find_last_not_of('.') + 1, text.size()));
        self->status_.set(text + std::string(1 + self->dots_++ % 3, '.'));
        Fl::repeat_timeout(0.4, &SignIn::tick, self);
    }

    Owner owner_;
    unsigned dots_ = 0;
    Text title_{30, 22, 360, 30, 24, &Look::text, true};
    Text label_server_{30, 66, 360, 18, small_size, &Look::quiet};
    Fl_Input server_{30, 84, 360, 32};
    Text server_error_{30, 118, 360, 34, small_size, &Look::warning};
    Text label_name_{30, 152, 360, 18, small_size, &Look::quiet};
    Fl_Input name_{30, 170, 360, 32};
    Text name_error_{30, 204, 360, 34, small_size, &Look::warning};
    Text label_password_{30, 238, 200, 18, small_size, &Look::quiet};
    Fl_Secret_Input password_{30, 256, 360, 32};
    Fl_Check_Button show_password_{332, 236, 60, 18, "Show"};
    Text password_error_{30, 290, 360, 34, small_size, &Look::warning};
    Fl_Check_Button register_{28, 326, 220, 30, "This is a new account"};
    Button enter_{280, 324, 110, 34, "Enter", [this] { submit(); }, true};
    Text status_{30, 366, 360, 20, small_size, &Look::quiet};
    Text warning_{0, 0, 0, 0, small_size, &Look::warning};  // drawn by draw()
    Text key_title_{30, 376, 360, 40, small_size + 1, &Look::text};
    Text key_{30, 420, 360, 84, small_size + 1, &Look::text, true};
    Button accept_{30, 512, 170, 34, "It is the same", [this] { owner_.answer_key(true); }};
    Button refuse_{220, 512, 170, 34, "Do not connect", [this] { owner_.answer_key(false); }, true};
};

// ---- The main window ----------------------------------------------------------------------------

class MainWindow : public Fl_Double_Window {
  public:
    struct Owner {
        PeopleList::Owner list;
        ConversationView::Owner view;
        MessageInput::Owner input;
        std::function<void()> send_file, verify, trust, toggle_details, toggle_theme, toggle_sound;
        std::function<void()> close, drawn;
        std::function<std::string()> title, subtitle;
    };

    explicit MainWindow(Owner owner)
        : Fl_Double_Window(960, 640, "ChatSecure"), owner_(with_layout(std::move(owner))) {
        details_.end();
        end();
        resizable(nullptr);
        size_range(720, 480);  // what one compares before trusting somebody is never cut
        menu_.add(
            "Dark theme", 0, [](Fl_Widget*, void* f) { call(f); }, &owner_.toggle_theme);
        menu_.add(
            "Sound for messages", 0, [](Fl_Widget*, void* f) { call(f); }, &owner_.toggle_sound);
        menu_.add(
            "Quit", FL_COMMAND + 'q', [](Fl_Widget*, void* f) { call(f); }, &owner_.close);
        callback([](Fl_Widget*, void* self) { static_cast<MainWindow*>(self)->owner_.close(); },
                 this);
        details_.hide();
        redress();
        compared_.callback(
            [](Fl_Widget* check, void* button) {
                bool yes = static_cast<Fl_Check_Button*>(check)->value() != 0;
                auto* trust = static_cast<Button*>(button);
                yes ? trust->activate() : trust->deactivate();
            },
            &trust_);
        side_.box(FL_FLAT_BOX);
        details_.box(FL_FLAT_BOX);
        layout();
    }

    ConversationView& view() { return view_; }
    bool is_at_end() const { return view_.is_at_end(); }
    MessageInput& input() { return input_; }
    PeopleList& list() { return list_; }
    MenuButton& menu() { return menu_; }

    void redress() {
        color(look().window.color());
        details_.color(look().panel.color());
        dress(*this);
        details_.color(look().panel.color());
        side_.color(look().panel.color());
        menu_.color(look().field.color());
        menu_.textcolor(look().text.color());
        view_.color(look().window.color());
        redraw();
    }
    void set_state(const std::string& text, Rgb Look::*colour) {
        state_.set(text);
        state_.set_colour(colour);
        state_colour_ = colour;
        redraw();
    }
    void end_input() {
        input_.deactivate();
        send_file_.deactivate();
    }
    // A sentence across the window that must not be overlooked; empty: none.
    void set_banner(const std::string& text) {
        banner_.set(text);
        layout();
    }
    bool has_details() const { return details_.visible() != 0; }
    void show_details(bool show) {
        show ? details_.show() : details_.hide();
        layout();
    }
    // `must_trust`: the identity has changed. Whoever has ticked "I compared" has compared what was
    // shown then: anything else takes the tick away.
    void set_details(const std::string& heading, const std::string& text, bool can_verify,
                     bool must_trust) {
        if (heading != details_title_.get() || text != details_text_.get()) compared_.value(0);
        details_title_.set(heading);
        details_text_.set(text);
        can_verify ? verify_.show() : verify_.hide();
        must_trust ? compared_.show() : compared_.hide();
        must_trust ? trust_.show() : trust_.hide();
        compared_.value() != 0 ? trust_.activate() : trust_.deactivate();
        layout();
    }

    void resize(int nx, int ny, int nw, int nh) override {
        Fl_Double_Window::resize(nx, ny, nw, nh);
        layout();
    }
    void draw() override {
        Fl_Double_Window::draw();
        const Look& l = look();
        fl_color(l.line.color());
        fl_line(list_width, 0, list_width, h());
        int right = send_file_.x() - gap, head = top();  // which measures with a font of its own
        use_font(title_size, true);
        fl_color(l.text.color());
        draw_text(owner_.title(), list_width + 2 * gap, head + 24, right - list_width - 2 * gap);
        use_font(small_size);
        fl_color(l.quiet.color());
        draw_text(owner_.subtitle(), list_width + 2 * gap, head + 42, right - list_width - 2 * gap);
        fl_color((l.*state_colour_).color());
        fl_pie(12, h() - 30, 9, 9, 0, 360);
        if (!banner_.get().empty()) draw_banner();
        owner_.drawn();
    }
    int handle(int event) override {
        if (event == FL_SHORTCUT || event == FL_KEYBOARD) {
            int key = Fl::event_key();
            if (is_window_key()) {
                if (key == FL_Page_Up) list_.step(-1);
                if (key == FL_Page_Down) list_.step(1);
                if (key == 'o') owner_.send_file();
                if (key == 'd') owner_.toggle_details();
                return 1;
            }
            if (key == FL_Escape) return input_.take_focus(), 1;  // and never closes the window
            if (event == FL_KEYBOARD && is_text() && input_.active() != 0)  // nobody wanted it
                return input_.take_focus(), input_.handle(event);
        }
        return Fl_Double_Window::handle(event);
    }

    void layout() {
        const int bottom = 48, head = 52;
        int details = has_details() ? std::min(details_width, (w() - list_width) / 2) : 0;
        int middle = w() - list_width - details;
        side_.resize(0, top(), list_width, h() - top());
        list_.resize(0, top(), list_width, h() - bottom - top());
        state_.resize(28, h() - 34, list_width - 36 - 36, 34);
        menu_.resize(list_width - 36, h() - 41, 30, 30);
        int buttons = list_width + middle - gap;
        details_button_.resize(buttons - 76, top() + 11, 76, 30);
        send_file_.resize(buttons - 76 - gap - 66, top() + 11, 66, 30);
        int input_height = std::min(input_.wanted_height(), h() / 3);
        input_.resize(list_width + gap, h() - input_height - gap, middle - 2 * gap, input_height);
        view_.resize(list_width + 1, top() + head, middle - 1,
                     h() - top() - head - input_height - 2 * gap);
        details_.resize(list_width + middle, top(), details, h() - top());
        layout_details();
        init_sizes();
        redraw();
    }

    struct Place {
        const char* name;
        const Fl_Widget* widget;
    };
    std::vector<Place> places() const {
        return {{"input", &input_},   {"send-file", &send_file_}, {"details", &details_button_},
                {"verify", &verify_}, {"compared", &compared_},   {"trust", &trust_},
                {"people", &list_},   {"menu", &menu_},           {"view", &view_}};
    }

  private:
    static bool is_text() {
        return Fl::event_length() > 0 && static_cast<unsigned char>(Fl::event_text()[0]) >= ' ' &&
               (Fl::event_state() & (FL_CTRL | FL_ALT | FL_META)) == 0;
    }
    static void call(void* function) { (*static_cast<std::function<void()>*>(function))(); }
    // What the input asks of this window is answered here, all else by the App.
    Owner with_layout(Owner owner) {
        owner.input.resized = [this] { layout(); };
        owner.input.scroll = [this](int pages) { view_.scroll_pages(pages); };
        return owner;
    }

    int top() const { return banner_.get().empty() ? 0 : banner_height(); }
    int banner_height() const {
        use_font(small_size, true);
        int lines = static_cast<int>(::wrap(banner_.get(), w() - 4 * gap).size());
        return std::min(lines * (small_size + 5) + 2 * gap, h() / 2);
    }
    void draw_banner() {
        const Look& l = look();
        fl_push_clip(0, 0, w(), top());
        fl_color(l.warning.color());
        fl_rectf(0, 0, w(), top());
        fl_color(l.window.color());
        use_font(small_size, true);
        int at = gap + small_size;
        for (const Span& line : ::wrap(banner_.get(), w() - 4 * gap)) {
            fl_draw(banner_.get().data() + line.begin, static_cast<int>(line.end - line.begin),
                    2 * gap, at);
            at += small_size + 5;
        }
        fl_pop_clip();
    }
    void layout_details() {
        int left = details_.x() + 2 * gap, wide = std::max(details_.w() - 4 * gap, 10);
        int at = details_.y() + 2 * gap;
        details_title_.resize(left, at, wide, 24);
        at += 30;
        details_text_.resize(left, at, wide, 10);
        int room = h() - at - 90;
        int high = std::min(details_text_.wanted_height(), std::max(room, 20));
        details_text_.resize(left, at, wide, high);
        at += high + gap;
        verify_.resize(left, at, wide, 32);
        compared_.resize(left - 4, at, wide + 8, 28);
        trust_.resize(left, at + 32, wide, 32);
    }

    Owner owner_;
    Rgb Look::*state_colour_ = &Look::quiet;
    Text banner_{0, 0, 0, 0, small_size, &Look::warning, true};  // drawn by draw_banner()
    Fl_Box side_{0, 0, list_width, 100};
    PeopleList list_{0, 0, list_width, 100, owner_.list};
    Text state_{0, 0, 10, 10, small_size, &Look::quiet};
    MenuButton menu_{0, 0, 30, 30};
    Button send_file_{0, 0, 66, 30, "File\u2026", [this] { owner_.send_file(); }};
    Button details_button_{0, 0, 76, 30, "Details", [this] { owner_.toggle_details(); }};
    ConversationView view_{0, 0, 100, 100, owner_.view};
    MessageInput input_{0, 0, 100, 34, owner_.input};
    Fl_Group details_{0, 0, details_width, 100};
    Text details_title_{0, 0, 10, 10, text_size, &Look::text, true};
    Text details_text_{0, 0, 10, 10, small_size + 1, &Look::text};
    Button verify_{0, 0, 10, 10, "Mark as verified", [this] { owner_.verify(); }, true};
    Fl_Check_Button compared_{0, 0, 10, 10, "I compared the number"};
    Button trust_{0, 0, 10, 10, "Trust the new identity", [this] { owner_.trust(); }};
};

// ---- Between the windows and the engine ---------------------------------------------------------

struct Settings {  // what is remembered from one time to the next: everything but the password
    std::string server = "localhost:5000", user;
    bool dark = false, sound = false;
};

struct Flags {
    SignInForm form;
    bool ready = false;  // there is a password: sign in at once
    bool accept_new = false, report = false;
    std::filesystem::path home;
    chatsecure::FileTransfers::Options files;
    std::optional<chatsecure::Fingerprint> server_key;
};

class App {
  public:
    explicit App(Flags flags) : flags_(std::move(flags)) {
        load_settings();
        dark = settings_.dark;
        SignInForm form = flags_.form;
        if (form.server.empty()) form.server = settings_.server;
        if (form.user.empty()) form.user = settings_.user;
        conversations_[""];
        redress();
        sign_in_.fill(form);
        sign_in_.show();
        if (flags_.report) Fl::add_timeout(tick_seconds, &App::tick, this);
        Fl::add_check(&App::mark_read, this);
        if (flags_.ready) submit(form);
    }

    int run() {
        while (!quit_) Fl::wait(1000);
        client_.reset();
        while (saver_.joinable()) Fl::wait(1000);  // settings_saved joins it
        return 0;
    }

  private:
    // ---- Settings and looks ---------------------------------------------------------------------

    std::filesystem::path settings_file() const { return flags_.home / "window"; }
    void load_settings() {
        std::optional<chatsecure::SecretBytes> file;
        try {
            file = chatsecure::read_file(settings_file(), 65536);
        } catch (const chatsecure::Error&) {
            return;  // comfort only: the window begins as it would the first time
        }
        if (!file) return;
        std::istringstream in{chatsecure::to_string(*file)};
        for (std::string line; std::getline(in, line);) {
            std::size_t equals = std::min(line.find('='), line.size());
            std::string key = line.substr(0, equals);
            std::string value = line.substr(std::min(equals + 1, line.size()));
            if (key == "server") settings_.server = value;
            if (key == "user") settings_.user = value;
            if (key == "dark") settings_.dark = value == "1";
            if (key == "sound") settings_.sound = value == "1";
        }
    }
    // On a thread of its own, and one at a time: a window must not wait for a disk.
    void save_settings() {
        if (saver_.joinable()) {
            save_again_ = true;
            return;
        }
        std::string text =
            concat("server=", settings_.server, "\nuser=", settings_.user,
                   "\ndark=", settings_.dark ? 1 : 0, "\nsound=", settings_.sound ? 1 : 0, "\n");
        saver_ = std::thread([this, text] {
            try {
                chatsecure::make_private_directory(flags_.home);
                chatsecure::write_file(settings_file(), chatsecure::as_bytes(text),
                                       chatsecure::FileMode::owner_only);
            } catch (const chatsecure::Error& e) {
                unsaved_ = e.what();
            }
            Fl::awake(&App::settings_saved, this);
        });
    }
    static void settings_saved(void* data) {
        auto* self = static_cast<App*>(data);
        self->saver_.join();  // to call us was the last that it did
        if (!self->unsaved_.empty())
            self->note(std::exchange(self->unsaved_, ""), Entry::Kind::warning);
        if (std::exchange(self->save_again_, false)) self->save_settings();
    }
    void redress() {
        dress_toolkit();
        sign_in_.redress();
        main_.redress();
        main_.menu().mode(0, FL_MENU_TOGGLE | (settings_.dark ? FL_MENU_VALUE : 0));
        main_.menu().mode(1, FL_MENU_TOGGLE | (settings_.sound ? FL_MENU_VALUE : 0));
    }

    // For tests: what the window shows, as lines.
    void report(const std::string& line) {
        if (flags_.report) std::cout << line << std::endl;
    }
    void report_file(const char* what, const chatsecure::FileInfo& file) {
        report(concat(what, file.sending ? " to " : " from ", file.user, " ", visible(file.name)));
    }
    // How late the window's own timer is, at worst: how long it ever did not listen.
    static constexpr double tick_seconds = 0.02;
    static void tick(void* data) {
        auto* self = static_cast<App*>(data);
        auto now = chatsecure::Clock::now();
        auto took = std::chrono::duration_cast<chatsecure::Milliseconds>(now - self->last_tick_);
        std::int64_t late = took.count() - 20;
        if (self->last_tick_ != chatsecure::Clock::time_point{} && late > self->slowest_ms_)
            self->report(concat("slowest ", self->slowest_ms_ = late, " ms"));
        self->last_tick_ = now;
        Fl::repeat_timeout(tick_seconds, &App::tick, data);
    }

    // ---- Signing in -----------------------------------------------------------------------------

    void submit(const SignInForm& form) {
        chatsecure::ClientOptions options;
        try {
            chatsecure::HostPort server = chatsecure::parse_host_port(form.server, 5000);
            options.host = server.host;
            options.port = server.port;
        } catch (const chatsecure::Error& e) {
            return sign_in_.show_error(SignIn::Field::server, e.what());
        }
        try {
            options.user = chatsecure::fold_name(form.user);
        } catch (const chatsecure::Error& e) {
            return sign_in_.show_error(SignIn::Field::name, e.what());
        }
        options.password = form.password;
        options.register_account = registering_ = form.register_account;
        options.home = flags_.home;
        options.files = flags_.files;
        options.server_key = flags_.server_key;
        options.accept_new_server = flags_.accept_new;
        options.ask_about_server = true;
        options.on_event = [this] {
            if (!woken_.exchange(true)) Fl::awake(&App::take_events, this);
        };
        settings_.server = form.server;
        settings_.user = options.user;
        sign_in_.set_busy("Connecting");
        client_.reset();
        client_ = std::make_unique<chatsecure::Client>(std::move(options));
    }

    void sign_in_failed(const chatsecure::Stopped& stopped) {
        using enum chatsecure::StopReason;
        report(concat("sign-in-error ", visible(stopped.sentence)));
        sign_in_.set_busy("");
        switch (stopped.reason) {
            case server_key_changed:
            case server_distrusted:
                return sign_in_.show_warning(shown(stopped.sentence));
            case cannot_connect:
            case server_key_unknown:
                return sign_in_.show_error(SignIn::Field::server, first_sentence(stopped.sentence));
            case login_refused:
                return sign_in_.show_error(
                    registering_ ? SignIn::Field::name : SignIn::Field::password,
                    visible(stopped.sentence));
            case left:
            case local_trouble:
                return sign_in_.show_error(SignIn::Field::password, visible(stopped.sentence));
        }
    }
    static std::string first_sentence(const std::string& text) {
        return visible(text.substr(0, std::min(text.find('\n'), std::size_t{160})));
    }

    // ---- Events: in this thread, some at a time -------------------------------------------------

    static void take_events(void* data) {
        auto* self = static_cast<App*>(data);
        self->woken_ = false;
        int taken = 0;
        constexpr int at_once = 200;  // then the window has its turn
        for (; taken < at_once && self->client_; ++taken) {
            std::optional<chatsecure::Event> event = self->client_->poll_event();
            if (!event) break;
            self->time_ = event->time;
            std::visit([self](const auto& what) { self->on(what); }, event->what);
        }
        // There may be more. Whoever sets `woken_` calls us again: the engine for a new event, or
        // we ourselves, after the window has drawn what there is.
        if (taken == at_once && !self->woken_.exchange(true))
            Fl::add_timeout(0.001, &App::take_events, data);
        if (taken > 0) self->refresh();
    }

    void on(const chatsecure::Connecting&) { set_state("connecting", &Look::quiet); }
    void on(const chatsecure::ServerKeyUnknown& e) {
        sign_in_.show_key(e.fingerprint);
        report(concat("asks-about-key ", e.fingerprint.text()));
    }
    void on(const chatsecure::MakingIdentity&) { sign_in_.set_busy("Making your identity key"); }
    void on(const chatsecure::LoggedIn& e) {
        for (const std::string& user : e.others) person(user).online = true;
        online_ = true;
        set_state(concat("online as ", e.user), &Look::online);
        ask_about_people();
        if (e.again) return note("Connected again.", Entry::Kind::system);
        flags_.form.password = {};  // wiped, as the field's
        sign_in_.forget_password();
        save_settings();
        sign_in_.hide();
        sign_in_.set_busy("");
        main_.show();
        choose("");
        main_.input().take_focus();
        note(concat("You are ", e.user, " at ", visible(e.server),
                    ". Everything written here is read "
                    "by everyone who is online, and by nobody else."),
             Entry::Kind::system);
    }
    void on(const chatsecure::ConnectionLost& e) {
        for (auto& [name, c] : conversations_) c.online = false;
        online_ = false;
        show_waiting();
        note(concat("The connection is lost: ", visible(e.reason),
                    " What you write is sent when it is back."),
             Entry::Kind::system);
    }
    void on(const chatsecure::PersonJoined& e) {
        person(e.user).online = true;
        asked_.erase(e.user);
        add("", {.kind = Entry::Kind::system, .text = concat(e.user, " joined")});
        ask_about_people();
    }
    void on(const chatsecure::PersonLeft& e) {
        person(e.user).online = false;
        add("", {.kind = Entry::Kind::system, .text = concat(e.user, " left")});
    }
    void on(const chatsecure::RoomMessage& e) {
        check_trust(e.from);
        add("", {.from = e.from, .text = shown(e.text), .own = e.own, .id = e.own ? e.id : 0});
    }
    void on(const chatsecure::PrivateMessage& e) {
        reply_to_ = e.peer;
        check_trust(e.peer);
        bool is_new = e.own && !conversations_.contains(e.peer);
        add(e.peer, {.from = e.own ? client_->user() : e.peer,
                     .text = shown(e.text),
                     .own = e.own,
                     .id = e.own ? e.id : 0});
        if (is_new) choose(e.peer);  // perhaps a slip, and nobody is called so: it is seen
    }
    void on(const chatsecure::MessagesLost& e) {
        warn(e.from, concat(e.count, e.count == 1 ? " message" : " messages", " from ", e.from,
                            e.count == 1 ? " was" : " were", " lost on the way."));
    }
    void on(const chatsecure::DeliveryChanged& e) {
        using enum chatsecure::Delivery;
        auto found = conversations_.find(e.to);
        if (found != conversations_.end()) found->second.mark(e);
        report(concat("mark ", mark_of(e.state), " ", visible(e.text)));
        if (!online_ && !over_) show_waiting();
        if (e.state != failed) return;
        if (quitting_ && !quiet_loss_) ++lost_;
        std::string text = concat(
            e.to.empty() ? "Not sent to everyone: " : concat("Not delivered to ", e.to, ", who "),
            visible(e.reason), ": ", shown(e.text));
        if (found != conversations_.end())
            warn(e.to, text);
        else
            note(text, Entry::Kind::warning);  // perhaps a slip: nobody is called so
    }
    // Where it belongs, and no louder: others could fill the list with alarms.
    void on(const chatsecure::Complaint& e) {
        add(conversations_.contains(e.user) ? e.user : "",
            {.kind = Entry::Kind::system, .text = visible(e.text)});
    }
    void on(const chatsecure::IdentityReplaced& e) {
        warn("",
             concat("YOUR IDENTITY IS A NEW ONE: this account had another one before. Everybody "
                    "who knew the old one is warned, and reads and sends you nothing until they "
                    "trust the new one. Tell them its fingerprint by telephone: ",
                    e.now.text()));
    }
    void on(const chatsecure::IdentityPinned& e) {
        asked_.erase(e.user);
        add(e.user, {.kind = Entry::Kind::system,
                     .text = concat("First contact with ", e.user,
                                    ". Whoever wants to be certain "
                                    "compares the safety number: Details.")});
        if (e.user == current_) show_details();
    }
    void on(const chatsecure::IdentityChanged& e) {
        Conversation& c = person(e.user);
        c.trusted = c.verified = false;
        changed_[e.user] = e;
        numbers_.erase(e.user);  // it was another one's
        asked_.erase(e.user);
        warn(e.user, concat("THE IDENTITY OF ", e.user,
                            " HAS CHANGED. Nothing is sent to or shown "
                            "from ",
                            e.user, " until you trust the new one: Details."));
        if (e.user == current_) show_details();
    }
    void on(const chatsecure::SafetyNumber& e) {
        numbers_[e.user] = e;
        Conversation& c = person(e.user);
        if (e.verified && changed_.erase(e.user) > 0) c.trusted = true;  // both in one act
        check_trust(e.user);
        set_verified(c, e.verified);
        report(concat("safety-number ", e.user, " ", e.digits));
        if (e.user == std::exchange(verifying_, "")) {  // a line asked for it
            choose(e.user);
            main_.show_details(true);
        }
        if (e.user == current_) show_details();
    }
    void on(const chatsecure::People& e) {
        std::string names;
        for (const chatsecure::Person& p : e.people) {
            names += concat(names.empty() ? "" : ", ", p.user, p.self ? " (you)" : "");
            auto found = conversations_.find(p.user);
            if (p.self || found == conversations_.end()) continue;
            Conversation& c = found->second;
            c.ignored = p.ignored;
            if (p.met) {  // otherwise what we knew of them still stands
                c.trusted = p.trusted;
                if (p.trusted && changed_.erase(p.user) > 0) {
                    numbers_.erase(p.user);  // it may be that of somebody who is not trusted
                    asked_.erase(p.user);
                }
            }
            set_verified(c, p.verified && c.trusted);
        }
        if (std::exchange(who_, false)) note(concat("Online: ", names), Entry::Kind::system);
        people_asked_ = false;
        if (std::exchange(people_changed_, false)) ask_about_people();
        show_details();
    }
    void on(const chatsecure::Notice& e) { note(visible(e.text), Entry::Kind::system); }
    void on(const chatsecure::Problem& e) {
        verifying_.clear();
        note(visible(e.text), Entry::Kind::warning);
    }

    void on(const chatsecure::FileEvent& e) {
        using enum chatsecure::FileEvent::Phase;
        bool is_new = !cards_.contains(e.file.number);
        FileCard& c = card(e.file, state_after(e.phase));
        c.done = e.done;
        c.bytes_per_second = e.bytes_per_second;
        c.note = e.sentence;
        c.path = e.path;
        if (is_new)
            add(e.file.user, {.kind = Entry::Kind::file,
                              .from = e.file.sending ? "" : e.file.user,
                              .own = e.file.sending,
                              .file = e.file.number});
        if (e.phase == started) report_file("file-moving", e.file);
        if (e.phase == finished) report_file("file-done", e.file);
        if (e.phase == interrupted || e.phase == stopped)
            report(concat("file-stopped ", visible(e.sentence)));
    }
    static FileCard::State state_after(chatsecure::FileEvent::Phase phase) {
        using enum chatsecure::FileEvent::Phase;
        switch (phase) {
            case offered:
            case offer_sent:
                return FileCard::State::offered;
            case queued:
            case started:
            case progress:
                return FileCard::State::moving;
            case finished:
                return FileCard::State::done;
            case interrupted:
                return FileCard::State::interrupted;
            case stopped:
                return FileCard::State::stopped;
        }
        return FileCard::State::stopped;
    }
    void on(const chatsecure::FileList& e) {
        if (e.files.empty()) note("No files are offered or on their way.", Entry::Kind::system);
        for (const chatsecure::FileStatus& f : e.files)
            note(concat("File ", f.file.number, ": ", visible(f.file.name),
                        f.file.sending ? " to " : " from ", f.file.user),
                 Entry::Kind::system);
    }
    void on(const chatsecure::Stopped& e) {
        if (quitting_ && lost_ == 0) {
            quit_ = true;
        } else if (main_.shown() == 0) {
            sign_in_failed(e);
        } else {
            report(concat("stopped ", visible(e.sentence)));
            for (auto& [name, c] : conversations_) c.online = false;
            over_ = true;
            set_state("disconnected", &Look::warning);
            main_.set_banner(
                lost_ == 0 ? shown(e.sentence)
                           : concat(lost_, lost_ == 1 ? " message was" : " messages were",
                                    " not delivered: see the marks. Close the window once more."));
            main_.end_input();
        }
    }

    // ---- The model changes ----------------------------------------------------------------------

    Conversation& person(const std::string& user) {
        if (conversations_.size() >= forget_at_) forget_strangers();
        Conversation& c = conversations_[user];
        c.name = user;
        return c;
    }
    // Those who have left and never said a word: a server may announce names without end.
    void forget_strangers() {
        std::erase_if(conversations_, [&](const auto& entry) {
            const auto& [name, c] = entry;
            return !name.empty() && name != current_ && !c.online && c.trusted && c.entries.empty();
        });
        auto is_gone = [&](const auto& entry) { return !conversations_.contains(entry.first); };
        std::erase_if(numbers_, is_gone);
        std::erase_if(changed_, is_gone);
        std::erase_if(asked_, [&](const auto& name) { return !conversations_.contains(name); });
        forget_at_ = 2 * conversations_.size() + 1000;
    }
    // The identity had changed, and here is a sign that it is settled: is it?
    void check_trust(const std::string& user) {
        if (changed_.contains(user)) ask_about_people();
    }
    void set_verified(Conversation& c, bool verified) {
        if (verified && !c.verified) report(concat("verified ", c.name));
        c.verified = verified;
    }
    FileCard& card(const chatsecure::FileInfo& file, FileCard::State state) {
        if (cards_.size() > Conversation::scrollback) {  // those of long ago go, as messages do
            using enum FileCard::State;
            auto over = std::find_if(cards_.begin(), cards_.end(), [](const auto& entry) {
                return entry.second.state == done || entry.second.state == stopped;
            });
            if (over != cards_.end()) cards_.erase(over);
        }
        FileCard& c = cards_[file.number];
        c.file = file;
        c.state = state;
        return c;
    }
    void add(const std::string& where, Entry entry) {
        Conversation& c = person(where);
        entry.time = time_;
        bool from_others =
            !entry.own && (entry.kind == Entry::Kind::message || entry.kind == Entry::Kind::file);
        bool news = from_others || entry.kind == Entry::Kind::warning;
        const Entry& added = c.add(std::move(entry));
        if (where == current_) main_.view().update();
        bool seen = where == current_ && is_reading();
        if (news && !seen) ++c.unread;
        if (from_others && !seen && settings_.sound) fl_beep(FL_BEEP_MESSAGE);
        if (flags_.report && added.kind != Entry::Kind::file)
            report(concat("shown ", c.title(), " | ", added.from.empty() ? "*" : added.from, ": ",
                          visible(added.text)));
        if (flags_.report && added.kind == Entry::Kind::file)
            report(concat("card ", added.file, " ", visible(cards_[added.file].file.name)));
    }
    // Whether the end of the current conversation is before somebody's eyes. No widget has the
    // focus while another program has the keyboard.
    bool is_reading() const { return main_.is_at_end() && Fl::focus() != nullptr; }
    // FLTK calls it whenever something has happened.
    static void mark_read(void* data) {
        auto* self = static_cast<App*>(data);
        unsigned& unread = self->conversations_.at(self->current_).unread;
        if (unread == 0 || self->main_.shown() == 0 || !self->is_reading()) return;
        unread = 0;
        self->refresh();
    }
    void warn(const std::string& where, const std::string& text) {
        add(where, {.kind = Entry::Kind::warning, .text = text});
    }
    // A line of our own, where the user looks.
    void note(const std::string& text, Entry::Kind kind) {
        add(current_, {.kind = kind, .text = text});
    }

    void set_state(const std::string& text, Rgb Look::*colour) {
        main_.set_state(text, colour);
        report(concat("state ", text));
    }

    void show_waiting() {
        std::size_t waiting = client_->waiting();
        set_state(waiting == 0 ? std::string("reconnecting")
                               : concat("reconnecting, ", waiting, " to send"),
                  &Look::warning);
    }

    // After some events: the list, the title and the cards are drawn once for all of them.
    void refresh() {
        unsigned unread = 0;
        for (const auto& [name, c] : conversations_) unread += c.unread;
        std::string title = concat(unread > 0 ? concat("(", unread, ") ") : "", client_->user(),
                                   " \u2013 ChatSecure");
        if (title != title_) main_.copy_label(title.c_str());
        title_ = title;
        main_.redraw();
    }

    // Everyone first, then who is online, then the rest; by name.
    std::vector<const Conversation*> rows() const {
        std::vector<const Conversation*> rows;
        for (const auto& [name, c] : conversations_) rows.push_back(&c);
        std::stable_sort(rows.begin(), rows.end(), [](const auto* a, const auto* b) {
            auto rank = [](const Conversation* c) {
                return c->name.empty() ? 0 : c->online ? 1 : 2;
            };
            return rank(a) < rank(b);
        });
        return rows;
    }

    // ---- What the user does ---------------------------------------------------------------------

    // False, with a sentence in the conversation, if the engine does not take it.
    bool post(chatsecure::Command command) {
        if (client_->try_post(std::move(command))) {
            if (!online_) show_waiting();
            return true;
        }
        note(over_ ? "You are not connected any more: this was not done."
                   : "Too much waits to be sent already: this was not done.",
             Entry::Kind::warning);
        refresh();
        return false;
    }
    // Who is trusted, verified, ignored. Asked once at a time, however many come and go meanwhile.
    void ask_about_people() {
        if (people_asked_)
            people_changed_ = true;
        else
            people_asked_ = client_->try_post(chatsecure::ListPeople{});
    }

    void choose(const std::string& name) {
        current_ = name;
        Conversation& c = person(name);
        c.unread = 0;
        main_.view().show_conversation(&c);
        show_details();
        refresh();
        report(concat("chosen ", c.title()));
    }

    // What was written, or a command. False if nothing came of it: then the line can be corrected.
    bool send_line(const std::string& line) {
        using namespace chatsecure;
        try {
            if (is_command(line, "/help")) {
                for (const auto& [usage, meaning] : command_help)
                    note(concat(usage, ": ", meaning), Entry::Kind::system);
                refresh();
                return true;
            }
            if (is_command(line, "/quit")) return close(), true;
            std::optional<Command> command = parse_command(line, reply_to_);
            if (!command) return true;
            if (auto* say = std::get_if<Say>(&*command); say && !current_.empty())
                command = Tell{current_, std::move(say->text)};
            if (const auto* tell = std::get_if<Tell>(&*command);
                tell && tell->user != current_ && conversations_.contains(tell->user))
                choose(tell->user);
            if (const auto* verify = std::get_if<Verify>(&*command)) verifying_ = verify->user;
            who_ = who_ || std::holds_alternative<ListPeople>(*command);
            bool changes_people = std::holds_alternative<Ignore>(*command) ||
                                  std::holds_alternative<Trust>(*command) ||
                                  std::holds_alternative<Verify>(*command);
            bool taken = post(std::move(*command));
            if (taken && changes_people) ask_about_people();
            return taken;
        } catch (const Error& e) {
            note(visible(e.what()), Entry::Kind::warning);
            refresh();
            return false;
        }
    }

    // A button on the card of a file.
    void press(Action action, unsigned number) {
        switch (action) {
            case Action::accept:
                return static_cast<void>(post(chatsecure::AcceptFile{number, ""}));
            case Action::decline:
                return static_cast<void>(post(chatsecure::DeclineFile{number}));
            case Action::cancel:
                return static_cast<void>(post(chatsecure::CancelFile{number}));
            case Action::open_folder: {
                std::string folder = cards_[number].path.parent_path().string();
                std::array<char, 512> problem{};
                if (fl_open_uri(concat("file://", folder).c_str(), problem.data(),
                                static_cast<int>(problem.size())) == 0)
                    note(concat("Cannot open ", visible(folder), ": ", problem.data()),
                         Entry::Kind::warning);
                return;
            }
        }
    }

    void offer(const std::filesystem::path& path) {
        if (current_.empty())
            note("Files go to one person: choose one on the left.", Entry::Kind::warning);
        else
            post(chatsecure::SendFile{current_, {path}});
        refresh();
    }
    void send_file() {
        if (current_.empty()) return offer({});
        Fl_Native_File_Chooser chooser(Fl_Native_File_Chooser::BROWSE_FILE);
        std::string title = concat("A file for ", current_);
        chooser.title(title.c_str());
        if (chooser.show() == 0) offer(chooser.filename());
    }
    // Absolute paths, or file:// addresses, one on each line.
    void drop_files(const std::string& text) {
        std::istringstream in(text);
        for (std::string line; std::getline(in, line);) {
            while (line.ends_with('\r') || line.ends_with(' ')) line.pop_back();
            if (line.starts_with("file://")) {
                line.erase(0, 7);
                fl_decode_uri(line.data());
                line.resize(std::strlen(line.c_str()));
            }
            if (line.empty()) continue;
            if (std::filesystem::path(line).is_relative()) {  // some other text
                note("Only files can be dropped here.", Entry::Kind::warning);
                return refresh();
            }
            offer(line);
        }
    }

    // ---- Trust ----------------------------------------------------------------------------------

    void toggle_details() {
        main_.show_details(!main_.has_details());
        asked_.erase(current_);
        show_details();
    }
    void show_details() {
        if (!main_.has_details()) return;
        if (current_.empty())
            return main_.set_details("Everyone",
                                     "Each message is sealed for each of those who are online. The "
                                     "server passes on what it cannot read.\n \nChoose a person on "
                                     "the left to see their identity.",
                                     false, false);
        auto number = numbers_.find(current_);
        auto changed = changed_.find(current_);
        std::string text;
        if (changed != changed_.end())
            text = concat("This is not the identity that you know.\n \nKnown:\n",
                          grouped(changed->second.pinned), "\n \nNow:\n",
                          grouped(changed->second.seen), "\n \n");
        bool must_trust = changed != changed_.end();
        bool known = number != numbers_.end() &&
                     (!must_trust || number->second.theirs == changed->second.seen);
        if (!known && asked_.insert(current_).second)
            client_->try_post(chatsecure::Verify{current_});
        if (must_trust && !known && !conversations_.at(current_).online)
            text += concat(current_, " is offline. When they are back, compare safety numbers.");
        if (known && must_trust)
            text += concat("Safety number with the new one:\n", grouped(number->second.digits));
        else if (known)
            text += concat(
                "Safety number: compare it by telephone, or face to face.\n \n",
                grouped(number->second.digits), "\n \nIdentity:\n", grouped(number->second.theirs),
                "\n \n",
                number->second.verified ? "\u2713 You have compared it." : "Not compared yet.");
        main_.set_details(current_, text, known && !must_trust && !number->second.verified,
                          known && must_trust);
    }
    void verify() {
        auto number = numbers_.find(current_);
        if (number == numbers_.end()) return;
        post(chatsecure::Verify{current_, true, number->second.theirs});
        ask_about_people();
    }
    // The button wants the tick "I compared the number", so this is more than Trust.
    void trust() {
        auto changed = changed_.find(current_);
        if (changed == changed_.end()) return;
        post(chatsecure::Verify{current_, true, changed->second.seen});
        ask_about_people();
    }

    // ---- Leaving --------------------------------------------------------------------------------

    void close() {
        if (!client_ || main_.shown() == 0) {  // nothing has begun
            quit_ = true;
            if (client_) client_->stop();
            return;
        }
        bool moving = std::any_of(cards_.begin(), cards_.end(), [](const auto& entry) {
            return entry.second.state == FileCard::State::moving;
        });
        if (moving && !quitting_) {
            report("asks-about-leaving");
            if (!ask(main_, "Files are on their way. They can go on next time.", "Leave", "Stay"))
                return report("stays");
        }
        bool unsent = !over_ && client_->waiting() > 0;
        if (unsent && !quitting_) {
            report("asks-about-messages");
            if (!ask(main_, "What waits to be sent is lost if you leave now.", "Leave", "Stay"))
                return report("stays");
        }
        // Asked twice, or nobody is there to say goodbye to. Otherwise the engine waits a little
        // for what is still on its way; what is lost without our having said so keeps the window.
        if (std::exchange(quitting_, true) || over_ || !online_ ||
            !client_->try_post(chatsecure::Leave{})) {
            client_->stop();
            quit_ = true;
            return;
        }
        quiet_loss_ = unsent;
        Fl::add_timeout(
            10,
            [](void* data) {
                auto* self = static_cast<App*>(data);
                if (!self->over_) self->quit_ = true;
            },
            this);
    }

    // For tests: where to click, whenever that has changed.
    void report_places() {
        if (!flags_.report) return;
        std::string places;
        auto put = [&](const std::string& name, int x, int y, int w, int h) {
            places += concat("place ", name, " ", x + w / 2, " ", y + h / 2, "\n");
        };
        auto put_widget = [&](const char* name, const Fl_Widget* widget) {
            if (widget->visible_r() != 0)
                put(name, widget->x(), widget->y(), widget->w(), widget->h());
        };
        if (sign_in_.shown() != 0 && main_.shown() == 0)
            for (const SignIn::Place& place : sign_in_.places())
                put_widget(place.name, place.widget);
        if (main_.shown() != 0) {
            for (const MainWindow::Place& place : main_.places())
                put_widget(place.name, place.widget);
            for (const auto& place : main_.view().places())
                put(concat(label_of(place.action), "-", place.file), place.x, place.y, place.w,
                    place.h);
            int row = 0;
            for (const Conversation* c : rows())
                put(concat("row-", c->title()), main_.list().x(),
                    main_.list().y() + gap + PeopleList::row_height * row++, main_.list().w(),
                    PeopleList::row_height);
        }
        if (places == places_) return;
        places_ = places;
        std::cout << places << std::flush;
    }

    SignIn::Owner sign_in_owner() {
        return {[this](const SignInForm& form) { submit(form); },
                [this](bool accept) {
                    sign_in_.show_key(std::nullopt);
                    sign_in_.set_busy("Connecting");
                    client_->try_post(chatsecure::AcceptServerKey{accept});
                },
                [this] { close(); }, [this] { report_places(); }};
    }
    MainWindow::Owner main_owner() {
        MainWindow::Owner owner;
        owner.list = {[this] { return rows(); }, [this] { return current_; },
                      [this](const std::string& name) { choose(name); }};
        owner.view = {[this](unsigned number) -> const FileCard* {
                          auto found = cards_.find(number);
                          return found == cards_.end() ? nullptr : &found->second;
                      },
                      [this](Action action, unsigned number) { press(action, number); },
                      [this](const std::string& text) { drop_files(text); }};
        owner.input = {
            [this](const std::string& line) { return send_line(line); },
            {},
            [this](const std::string& word, bool first) { return complete(word, first); },
            {},
            [this](const std::string& text) { drop_files(text); }};
        owner.send_file = [this] { send_file(); };
        owner.verify = [this] { verify(); };
        owner.trust = [this] { trust(); };
        owner.toggle_details = [this] { toggle_details(); };
        owner.toggle_theme = [this] {
            settings_.dark = dark = !dark;
            redress();
            report(concat("dark ", dark ? 1 : 0));
            save_settings();
        };
        owner.toggle_sound = [this] {
            settings_.sound = !settings_.sound;
            redress();
            save_settings();
        };
        owner.close = [this] { close(); };
        owner.drawn = [this] { report_places(); };
        owner.title = [this] { return conversations_.at(current_).title(); };
        owner.subtitle = [this] { return subtitle(); };
        return owner;
    }
    std::string subtitle() const {
        const Conversation& c = conversations_.at(current_);
        if (current_.empty()) {
            auto here =
                std::count_if(conversations_.begin(), conversations_.end(),
                              [](const auto& e) { return !e.first.empty() && e.second.online; });
            return here == 0   ? "nobody else is online"
                   : here == 1 ? "one other person is online"
                               : concat(here, " others are online");
        }
        return concat(c.online ? "online" : "offline",
                      !c.trusted   ? " \u00b7 identity has changed: nothing is sent"
                      : c.verified ? " \u00b7 verified"
                                   : "",
                      c.ignored ? " \u00b7 ignored" : "");
    }
    // Names, and commands if it is the first word.
    std::vector<std::string> complete(const std::string& word, bool first) const {
        std::vector<std::string> found;
        for (const auto& help : chatsecure::command_help) {
            std::string_view command = help.usage.substr(0, help.usage.find(' '));
            if (first && word[0] == '/' && command.starts_with(word)) found.emplace_back(command);
        }
        for (const auto& [name, c] : conversations_)
            if (!name.empty() && name.starts_with(word)) found.push_back(name);
        return found;
    }

    Flags flags_;
    Settings settings_;
    std::map<std::string, Conversation> conversations_;  // by name
    std::size_t forget_at_ = 5000;                       // so many are too many
    std::map<unsigned, FileCard> cards_;                 // by number
    std::map<std::string, chatsecure::SafetyNumber> numbers_;
    std::map<std::string, chatsecure::IdentityChanged> changed_;
    std::set<std::string> asked_;  // whose safety number we have asked for
    std::string verifying_;        // whose safety number a line has asked for
    bool people_asked_ = false;    // ListPeople is on its way,
    bool people_changed_ = false;  // and to be sent once more
    bool who_ = false;             // and its answer to be shown
    std::string current_, reply_to_, title_, places_;
    Time time_ = std::chrono::system_clock::now();  // of the event that is being handled
    bool registering_ = false, online_ = false, over_ = false, quitting_ = false, quit_ = false;
    std::size_t lost_ = 0;     // messages that failed while we were leaving,
    bool quiet_loss_ = false;  // which the user had not agreed to
    std::int64_t slowest_ms_ = -1;
    chatsecure::Clock::time_point last_tick_;
    SignIn sign_in_{sign_in_owner()};
    MainWindow main_{main_owner()};
    std::thread saver_;                           // joinable while settings are being saved
    bool save_again_ = false;                     // they have changed since
    std::string unsaved_;                         // why; written by saver_ before it ends
    std::atomic<bool> woken_ = false;             // take_events is on its way
    std::unique_ptr<chatsecure::Client> client_;  // last: its thread uses the line above
};

cxxopts::Options make_options() {
    cxxopts::Options options("gui_client_fltk", "The ChatSecure client in a window.\n");
    options.positional_help("[HOST[:PORT]]");
    auto add = options.add_options();
    add("server", "where the server is", cxxopts::value<std::string>()->default_value(""),
        "HOST[:PORT]");
    add("u,user", "your user name", cxxopts::value<std::string>()->default_value(""), "NAME");
    add("register", "make the account first");
    add("password-file",
        "its first line is the password (else CHATSECURE_PASSWORD, else the window)",
        cxxopts::value<std::string>()->default_value(""), "FILE");
    add("server-key", "the server's public key, or its fingerprint SHA256:...",
        cxxopts::value<std::string>(), "FILE|FINGERPRINT");
    add("accept-new", "trust the key of a server that is not known yet");
    add("home", "directory of identities, pins and settings",
        cxxopts::value<std::string>()->default_value(chatsecure::default_home().string()), "DIR");
    add("downloads", "where received files go; made when needed",
        cxxopts::value<std::string>()->default_value("downloads"), "DIR");
    add("report", "print what the window shows: for tests");
    add("version", "print the version and exit");
    add("help", "print this and exit");
    options.parse_positional({"server"});
    return options;
}

}  // namespace

int main(int argc, char** argv) {
    std::setlocale(LC_ALL, "");
    cxxopts::Options options = make_options();
    Flags flags;
    try {
        cxxopts::ParseResult given = options.parse(argc, argv);
        if (!given.unmatched().empty())
            throw chatsecure::Error(concat("\"", given.unmatched()[0], "\" is one word too many."));
        if (given.count("help") > 0) return std::cout << options.help(), 0;
        if (given.count("version") > 0)
            return std::cout << "ChatSecure window " << chatsecure::version << '\n', 0;
        flags.form.server = given["server"].as<std::string>();
        if (!flags.form.server.empty()) chatsecure::parse_host_port(flags.form.server, 5000);
        flags.form.user = given["user"].as<std::string>();
        flags.form.register_account = given.count("register") > 0;
        flags.accept_new = given.count("accept-new") > 0;
        flags.report = given.count("report") > 0;
        flags.home = given["home"].as<std::string>();
        flags.files.downloads = given["downloads"].as<std::string>();
        if (given.count("server-key") > 0)
            flags.server_key = chatsecure::fingerprint_from(given["server-key"].as<std::string>());
        if (std::optional<chatsecure::SecretBytes> password =
                chatsecure::find_password(given["password-file"].as<std::string>()))
            flags.form.password = *password;
        flags.ready = !flags.form.user.empty() && !flags.form.password.empty();
    } catch (const std::exception& e) {
        std::cerr << "gui_client_fltk: " << e.what()
                  << "\n./gui_client_fltk --help lists the flags.\n";
        return 2;
    }
#ifndef _WIN32
    chatsecure::make_write_errors_errors();
#endif
    Fl::lock();  // several threads: Fl::awake works
    Fl::set_boxtype(field_box, draw_field_box, 6, 7, 12, 13);
    Fl::set_boxtype(FL_DOWN_BOX, draw_field_box, 2, 2, 4, 4);  // FLTK's own widgets likewise
    Fl::set_boxtype(FL_UP_BOX, draw_field_box, 2, 2, 4, 4);
    Fl::visible_focus(1);
    Fl::option(Fl::OPTION_FNFC_USES_GTK, false);  // GTK's chooser stops our events while it is open
    return App(std::move(flags)).run();
}
