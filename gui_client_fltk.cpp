// gui_client_fltk: ChatSecure in a window, for FLTK 1.3 and 1.4. All of the work is in
// chatsecure.hpp, chapter 12; this program draws and listens.
//
//      chatsecure::Client -- events --> Fl::awake --> App::take_events --> App::on(each event)
//                         <-- commands --------------- App::send_line, App::press
//
// Where to look:
//      ink, theme           colours, light and dark, in one place
//      Conversation, Model  what there is to show
//      Wishes               what the windows want done
//      ConversationView     draw_message, draw_file: where it is drawn; handle: where clicks go
//      PeopleList           the list on the left
//      MessageInput         the keys of the input line
//      FileChooser          asks for a file
//      SignIn, MainWindow   the two windows: what stands where
//      App                  between the windows and the engine: events in, commands out
//
// While the windows are open nothing here waits for the network, a disk or a key (except to list
// the folder that somebody looks into): the engine's threads do that, and wake this one with
// Fl::awake.

#include "chatsecure.hpp"

#include <clocale>
#include <cmath>
#include <cxxopts.hpp>
#include <future>
#include <iostream>

#include <FL/Fl.H>
#include <FL/Fl_Box.H>
#include <FL/Fl_Button.H>
#include <FL/Fl_Check_Button.H>
#include <FL/Fl_Double_Window.H>
#include <FL/Fl_Hold_Browser.H>
#include <FL/Fl_Menu_Item.H>
#include <FL/Fl_Multiline_Input.H>
#include <FL/Fl_RGB_Image.H>
#include <FL/Fl_Scroll.H>
#include <FL/Fl_Secret_Input.H>
#include <FL/filename.H>
#include <FL/fl_ask.H>
#include <FL/fl_draw.H>
#if !defined(_WIN32) && !defined(__APPLE__)
#define CHATSECURE_X11
#if FL_MINOR_VERSION >= 4
#include <FL/platform.H>
#else
#include <FL/x.H>
#endif
#endif
#ifdef CHATSECURE_PANGO
#include <pango/pangoxft.h>
#endif

namespace {

using chatsecure::concat;
using chatsecure::Span, chatsecure::Standing, chatsecure::visible, chatsecure::visible_lines;
using Time = std::chrono::system_clock::time_point;

// ---- How it looks: set here and nowhere else ----------------------------------------------------

// A colour is a place in FLTK's own table of colours. Another theme is another content of that
// table and one redraw: no widget has to be told.
namespace ink {
constexpr Fl_Color window = 16, panel = 17, field = 18, text = 19, quiet = 20, line = 21,
                   accent = 22, on_accent = 23, own = 24, other = 25, warning = 26, alarm = 27,
                   online = 28, selected = 29;  // FLTK leaves us 16 to 31
// What is written in, and on what: each on each can be read (4.5 : 1), and so can the other pairs.
// Tests compute it.
constexpr std::array letters{text, quiet, accent, warning, online};
constexpr std::array grounds{window, panel, field, own, other, selected};
constexpr std::array<std::array<Fl_Color, 2>, 5> other_pairs{
    {{on_accent, accent}, {on_accent, text}, {warning, alarm}, {text, line}, {panel, quiet}}};
}  // namespace ink
template <std::size_t count>
using Shades = std::array<std::array<unsigned, count>, 2>;  // light, dark
constexpr Shades<14> theme{
    {{0xffffff, 0xf3f4f6, 0xffffff, 0x181c22, 0x5c6370, 0xd8dbe0, 0x155cc0, 0xffffff, 0xd6e7ff,
      0xeff0f3, 0xba1a1a, 0xfdeceb, 0x146c2e, 0xffe599},
     {0x181a1f, 0x21242a, 0x2b2f36, 0xe8eaed, 0xa4aab6, 0x40454e, 0x8ab4f8, 0x101828, 0x203a62,
      0x2f333b, 0xff897d, 0x432623, 0x81c995, 0x4a3c00}}};
// Those of people: each can be read on the window, and the window's own colour on each.
constexpr Shades<12> colours_of_people{
    {{0xb3261e, 0x9c4a08, 0x7a5c00, 0x4d6b00, 0x1b7a34, 0x00766c, 0x00708f, 0x1967d2, 0x4a52c8,
      0x8430ce, 0xa8268f, 0xb80657},
     {0xf28b82, 0xfcad70, 0xf0c75e, 0xc5d86d, 0x81c995, 0x6fd6c6, 0x78d9ec, 0x8ab4f8, 0xa9b1ff,
      0xc58af9, 0xf29be8, 0xff8bb0}}};

// The two things about the looks that a user chooses.
struct Style {
    bool dark = false;
    int zoom = 100;  // of letters, in per cent
} style;

constexpr int text_size = 15, small_size = 12, title_size = 18, gap = 8;
constexpr int margin = 2 * gap;  // between the side of a column and all that stands in it
constexpr int check_inset = 2;   // so far inside FLTK draws a check mark's box
constexpr int number_size = 17, details_width = 300;
constexpr Fl_Font plain = FL_HELVETICA, bold = FL_HELVETICA_BOLD, fixed_pitch = FL_COURIER;

constexpr int smallest_zoom = 70, largest_zoom = 200;
int scaled(int pixels) { return pixels * style.zoom / 100; }

Fl_Color colour_of(const std::string& person) {
    const auto& colours = colours_of_people[style.dark ? 1 : 0];
    return colours[chatsecure::person_colour(person, colours.size())] << 8;
}

// Fills the table; FLTK's own widgets (menus, check marks, scroll bars) take from it as well.
void set_theme() {
    Fl_Color place = ink::window;
    for (unsigned shade : theme[style.dark ? 1 : 0]) Fl::set_color(place++, shade << 8);
    auto copy = [](Fl_Color from, auto to) {
        unsigned char r = 0, g = 0, b = 0;
        Fl::get_color(from, r, g, b), to(r, g, b);
    };
    copy(ink::panel, Fl::background);
    copy(ink::field, Fl::background2);
    copy(ink::text, Fl::foreground);
    copy(ink::accent, [](auto... rgb) { Fl::set_color(FL_SELECTION_COLOR, rgb...); });
}

// ---- Small pieces of drawing --------------------------------------------------------------------

void use_font(int size, Fl_Font font = plain) { fl_font(font, scaled(size)); }

// A disc with a soft edge, which X11 cannot draw: made once for each size and colour.
Fl_Image& disc(int diameter, Fl_Color colour) {
    static std::map<std::pair<int, unsigned>, std::unique_ptr<Fl_Image>> made;
    unsigned char r = 0, g = 0, b = 0;
    Fl::get_color(colour, r, g, b);
    std::unique_ptr<Fl_Image>& image = made[{diameter, r << 16 | g << 8 | b}];
    if (image) return *image;
    std::vector<unsigned char> pixels;
    double radius = diameter / 2.0;
    for (int y = 0; y < diameter; ++y)
        for (int x = 0; x < diameter; ++x) {
            double distance = std::hypot(x + 0.5 - radius, y + 0.5 - radius);
            double cover = std::clamp(radius - distance + 0.5, 0.0, 1.0);
            pixels.insert(pixels.end(), {r, g, b, static_cast<unsigned char>(cover * 255)});
        }
    image.reset(Fl_RGB_Image(pixels.data(), diameter, diameter, 4).copy());
    return *image;
}

// A filled rectangle with round corners: its corners are quarters of a disc.
void draw_round(int x, int y, int w, int h, int radius, Fl_Color colour) {
    int r = std::max(std::min({radius, w / 2, h / 2}), 0);
    fl_color(colour);
    fl_rectf(x, y + r, w, h - 2 * r);
    fl_rectf(x + r, y, w - 2 * r, r);
    fl_rectf(x + r, y + h - r, w - 2 * r, r);
    if (r == 0) return;
    for (int right : {0, 1})
        for (int low : {0, 1})
            disc(2 * r, colour)
                .draw(x + right * (w - r), y + low * (h - r), r, r, right * r, low * r);
}
void draw_disc(int x, int y, int diameter, Fl_Color colour) { disc(diameter, colour).draw(x, y); }

// Takes the first letter of `text`, which must not be empty.
std::string_view take_letter(std::string_view& text) {
    std::string_view before = text;
    chatsecure::take_code_point(text);
    return before.substr(0, before.size() - text.size());
}

// FLTK 1.3 on X11 takes all letters of a text from one font, with boxes for emoji, and joins no
// Arabic. So Pango draws and measures whatever is more than ASCII, in FLTK's own widgets too. FLTK
// 1.4 has Pango itself; other systems do the same for FLTK.
#ifdef CHATSECURE_PANGO
class PangoDriver final : public Fl_Xlib_Graphics_Driver {
  public:
    using Fl_Xlib_Graphics_Driver::draw, Fl_Xlib_Graphics_Driver::width;
    void draw(const char* text, int size, int x, int y) override {
        Region clip = clip_region();
        if (is_ascii(text, size)) return Fl_Xlib_Graphics_Driver::draw(text, size, x, y);
        if (clip != nullptr && XEmptyRegion(clip) != 0) return;
        unsigned char r = 0, g = 0, b = 0;
        Fl::get_color(fl_color(), r, g, b);
        auto wide = [](unsigned char c) { return static_cast<unsigned short>(c * 257); };
        XftColor in{fl_xpixel(fl_color()), {wide(r), wide(g), wide(b), 0xffff}};
        XftDraw* canvas = XftDrawCreate(fl_display, fl_window, fl_visual->visual, fl_colormap);
        XftDrawSetClip(canvas, clip);
        pango_xft_render_layout_line(canvas, &in, line_of(text, size), x * PANGO_SCALE,
                                     y * PANGO_SCALE);
        XftDrawDestroy(canvas);
    }
    double width(const char* text, int size) override {
        if (is_ascii(text, size)) return Fl_Xlib_Graphics_Driver::width(text, size);
        PangoRectangle extent{};
        pango_layout_line_get_extents(line_of(text, size), nullptr, &extent);
        return pango_units_to_double(extent.width);
    }

  private:
    static bool is_ascii(const char* text, int size) {
        return std::all_of(text, text + size, [](char c) { return (c & 0x80) == 0; });
    }
    PangoLayoutLine* line_of(const char* text, int size) {
        static PangoLayout* layout = pango_layout_new(
            pango_font_map_create_context(pango_xft_get_font_map(fl_display, fl_screen)));
        const char* name = Fl::get_font(fl_font());  // "Bsans" is the bold one of " sans"
        PangoFontDescription* wanted = pango_font_description_from_string(name + 1);
        pango_font_description_set_absolute_size(wanted, fl_size() * PANGO_SCALE);
        if (*name == 'B') pango_font_description_set_weight(wanted, PANGO_WEIGHT_BOLD);
        pango_layout_set_font_description(layout, wanted);
        pango_font_description_free(wanted);
        pango_layout_set_text(layout, text, size);
        return pango_layout_get_line_readonly(layout, 0);
    }
};
#endif

double measure(std::string_view text) {
    return fl_width(text.data(), static_cast<int>(text.size()));
}
int width_of(std::string_view text) { return static_cast<int>(std::ceil(measure(text))); }

// `text`, or about as much of it as fits, with an ellipsis. In the current font.
std::string fitting(std::string_view text, int width) {
    if (width_of(text) <= width) return std::string(text);
    std::string part, more;
    while (width_of((more = concat(part, take_letter(text))) + "\u2026") < width) part = more;
    return part + "\u2026";
}

// Draws in the current font and colour; the second one only what fits.
void draw_at(std::string_view text, int x, int y) {
    fl_draw(text.data(), static_cast<int>(text.size()), x, y);
}
void draw_text(std::string_view text, int x, int y, int width) {
    draw_at(fitting(text, width), x, y);
}

// Where lines of `text` begin and end, if they are at most `width` wide in the current font. They
// break at spaces; a word that is too long for a line, between two letters.
std::vector<Span> wrap(std::string_view text, int width) {
    std::vector<Span> lines;
    for (std::size_t begin = 0;;) {
        std::size_t at = begin, end = begin, next = begin;  // `end`: after the last whole word
        double used = 0;
        while (at < text.size() && text[at] != '\n') {
            if (text[at] == ' ' && at > begin) next = 1 + (end = at);
            std::string_view left = text.substr(at), letter = take_letter(left);
            used += measure(letter);
            if (used > width && at > begin) break;
            at += letter.size();
        }
        bool is_last = at == text.size();
        if (is_last || text[at] == '\n') {
            lines.push_back({begin, at});
            if (is_last) return lines;
            begin = at + 1;
        } else {
            if (next == begin) next = end = at;
            lines.push_back({begin, end});
            begin = std::min(text.find_first_not_of(' ', next), text.size());
        }
    }
}

std::string day_text(Time time) {  // (Windows knows no %e, a day without a zero)
    int day = chatsecure::local_time(std::chrono::system_clock::to_time_t(time)).tm_mday;
    return concat(chatsecure::time_text(time, "%A, "), day, chatsecure::time_text(time, " %B %Y"));
}

// Everybody has a face: the first letter of the name in the person's colour.
void draw_avatar(const std::string& name, int x, int y, int size) {
    draw_disc(x, y, size, name.empty() ? ink::accent : colour_of(name));
    fl_color(name.empty() ? ink::on_accent : ink::window);
    fl_font(bold, size / 2);
    char letter = name.empty() ? '*' : name[0];
    if (letter >= 'a' && letter <= 'z') letter = static_cast<char>(letter - 32);
    fl_draw(std::string(1, letter).c_str(), x, y, size, size, FL_ALIGN_CENTER, nullptr, 0);
}

// A method as FLTK's callback: widget.callback(call<SignIn, &SignIn::submit>, this).
template <class T, void (T::*method)()>
void call(Fl_Widget*, void* self) {
    (static_cast<T*>(self)->*method)();
}

// The face of a button, in the current font: flat, with round corners.
void draw_face(int x, int y, int w, int h, const std::string& label, bool important, bool focus,
               bool pressed = false, bool active = true) {
    int edge = focus ? 2 : 1;
    Fl_Color face = important ? ink::accent : active ? ink::field : ink::panel;
    draw_round(x, y, w, h, 6, focus ? ink::text : important ? ink::accent : ink::line);
    if (pressed) face = important ? ink::text : ink::line;
    draw_round(x + edge, y + edge, w - 2 * edge, h - 2 * edge, 5, face);
    fl_color(!active ? ink::quiet : important ? ink::on_accent : ink::text);
    std::string text = fitting(label, w - gap);
    fl_draw(text.c_str(), x, y, w, h, FL_ALIGN_CENTER, nullptr, 0);
}

// The event is a press of Enter.
bool is_enter() {
    return Fl::event() == FL_KEYBOARD &&
           (Fl::event_key() == FL_Enter || Fl::event_key() == FL_KP_Enter);
}

// A flat button with round corners. Tab reaches it, Space and Enter press it.
class Button : public Fl_Button {
  public:
    Button(const std::string& label, std::function<void()> press, bool important = false)
        : Fl_Button(0, 0, 0, 0), press_(std::move(press)), important_(important) {
        copy_label(label.c_str());
        box(FL_NO_BOX);
        callback([](Fl_Widget* self, void*) { static_cast<Button*>(self)->press_(); });
    }
    int wanted_width() const {
        use_font(text_size - 1);
        return width_of(label()) + 3 * gap;
    }
    void draw() override {
        use_font(text_size - 1);
        draw_face(x(), y(), w(), h(), label(), important_ && active_r(), Fl::focus() == this,
                  value() != 0, active_r() != 0);
    }
    int handle(int event) override {
        if (event == FL_KEYBOARD && Fl::focus() == this && is_enter()) {
            press_();
            return 1;
        }
        // After a click the keyboard stays with whom it was, for whoever types goes on typing.
        if (event == FL_FOCUS && Fl::event() == FL_PUSH && Fl::event_inside(this) != 0) return 0;
        // The first click may have moved another button to where the second one comes.
        if (event == FL_PUSH && Fl::event_clicks() > 0) return 1;
        return Fl_Button::handle(event);
    }

  private:
    std::function<void()> press_;
    bool important_;
};

// A field of FLTK that is drawn anew when the focus comes or goes: its box shows it. Its label is
// what tests call it; nobody sees that.
template <class Input>
class InputField : public Input {
  public:
    explicit InputField(const char* name) : Input(0, 0, 0, 0, name) {
        this->labeltype(FL_NO_LABEL);
    }
    int handle(int event) override {
        if (event == FL_FOCUS || event == FL_UNFOCUS) this->redraw();
        return Input::handle(event);
    }
};

// A widget of FLTK with keys of our own: the function is asked first, and says whether it was one.
template <class Widget>
class WithKeys : public Widget {
  public:
    template <class... Rest>
    explicit WithKeys(std::function<bool()> key, Rest... rest)
        : Widget(rest...), key_(std::move(key)) {}
    int handle(int event) override {
        return event == FL_KEYBOARD && key_() ? 1 : Widget::handle(event);
    }

  private:
    std::function<bool()> key_;
};

// The keys that mean the same wherever the focus stands.
bool is_window_key() {
    constexpr std::array<int, 11> keys{FL_Page_Up, FL_Page_Down, 'o', 'd',         'q',        '+',
                                       '=',        '-',          '0', FL_KP + '+', FL_KP + '-'};
    return (Fl::event_state() & (FL_CTRL | FL_COMMAND)) != 0 &&
           std::find(keys.begin(), keys.end(), Fl::event_key()) != keys.end();
}

// A menu, with its left edge at x and its lower edge (upwards) or its upper one at y. What is
// chosen is done; meanwhile the chat goes on.
struct MenuLine {
    std::string label;
    std::function<void()> act;
    int flags = 0;
};
void pop_up(const std::vector<MenuLine>& lines, int x, int y, bool upwards = false) {
    std::vector<Fl_Menu_Item> items;
    for (const MenuLine& line : lines)
        items.push_back({line.label.c_str(), 0, nullptr, nullptr, line.flags, FL_NORMAL_LABEL,
                         plain, scaled(text_size - 1), ink::text});
    items.push_back({});
    use_font(text_size - 1);
    int height = static_cast<int>(lines.size()) * (fl_height() + 4) + 8;
    const Fl_Menu_Item* chosen = items.front().popup(x, upwards ? y - height : y);
    if (chosen != nullptr) lines[static_cast<std::size_t>(chosen - items.data())].act();
}

// ---- The model: what there is to show -----------------------------------------------------------

struct Entry {
    enum class Kind { message, system, warning, file } kind = Kind::message;
    std::string from{}, text{};
    bool own = false, mentions_us = false;
    Time time{};
    std::uint64_t id = 0;                         // of a message of our own
    std::optional<chatsecure::Delivery> state{};  // and what has become of it
    std::string reason{};                         // for what it waits
    bool first = true;                            // of a group by one sender
    bool new_day = true;                          // the entry before is of another one
    unsigned file = 0;                            // number of a file
    int laid_out_for = -1;                        // the width that `lines` and `links` are for
    std::vector<Span> lines{}, links{};
    int widest = 0;  // of the lines
    bool is_said() const { return kind == Kind::message || kind == Kind::file; }
};

// What was said with one person, or by everyone (then the name is empty).
struct Conversation {
    static constexpr std::size_t scrollback = 10'000;  // entries: bounds the memory
    std::string name;
    std::deque<Entry> entries;
    std::size_t dropped = 0;  // entries that are gone: entries[0] has this number
    unsigned unread = 0;
    bool online = false, verified = false, ignored = false;
    Standing standing = Standing::unknown;
    std::string draft;  // what is half typed, while another conversation is shown
    std::optional<chatsecure::IdentityChanged> changed;  // and it was not trusted since
    std::optional<chatsecure::SafetyNumber> number;
    bool number_asked = false;  // once, until something has happened

    bool is_trusted() const { return may_pass(standing); }
    // They ..., so nothing passes.
    const char* doubt() const {
        return standing == Standing::refused ? "has shown no valid key card"
               : changed                     ? "has another identity than before"
                                             : "has shown an old key card";
    }
    // The safety number is that of the identity that somebody has now.
    bool knows_number() const { return number && (!changed || number->theirs == changed->seen); }

    Entry& add(Entry entry) {
        if (!entries.empty()) {
            const Entry& last = entries.back();
            entry.new_day = day_text(last.time) != day_text(entry.time);
            entry.first = entry.new_day || !last.is_said() || last.from != entry.from ||
                          entry.time - last.time > std::chrono::minutes(5);
        }
        entries.push_back(std::move(entry));
        if (entries.size() > scrollback) {
            entries.pop_front();
            ++dropped;
        }
        return entries.back();
    }
    // Marks a message of our own, if it is still here. Gives its text if it has failed.
    std::string mark(const chatsecure::DeliveryChanged& e) {
        using enum chatsecure::Delivery;
        auto entry = std::find_if(entries.rbegin(), entries.rend(),
                                  [&](const Entry& one) { return one.id == e.id; });
        if (entry == entries.rend()) return "";
        entry->state = e.state;
        entry->reason = e.state == waiting ? visible(e.reason) : "";
        return e.state == failed ? entry->text : "";
    }
    std::string title() const { return name.empty() ? "Everyone" : name; }
};

using chatsecure::FileEvent;
bool is_over(const FileEvent& card) {
    return card.phase == FileEvent::Phase::finished || card.phase == FileEvent::Phase::stopped;
}
bool has_bar(const FileEvent& card) {
    using enum FileEvent::Phase;
    return card.phase == queued || card.phase == started || card.phase == progress ||
           card.phase == interrupted;
}

// What can be done with something in a conversation: a file's card, or a link.
enum class Action { save, decline, cancel, open, open_folder, open_link };
const char* label_of(Action action) {
    constexpr std::array<const char*, 6> labels{"Save", "Decline",     "Cancel",
                                                "Open", "Open folder", "Link"};
    return labels[static_cast<std::size_t>(action)];
}
std::vector<Action> actions_of(const FileEvent& card) {
    using enum FileEvent::Phase;
    if (card.phase == offered) return {Action::save, Action::decline};
    if (card.phase == stopped) return {};
    if (card.phase != finished) return {Action::cancel};
    if (card.file.sending) return {};
    return {Action::open, Action::open_folder};
}

class Model {
  public:
    std::map<std::string, Conversation> conversations{{"", {}}};  // by name
    std::string current;                                          // the one that is shown
    bool connected = false;

    const Conversation& shown() const { return conversations.at(current); }
    Conversation& person(const std::string& user) {
        Conversation& c = conversations[user];
        c.name = user;
        return c;
    }
    Conversation* find(const std::string& user) {
        auto found = conversations.find(user);
        return found == conversations.end() ? nullptr : &found->second;
    }
    // Everyone first, then who is online, then the rest; by name.
    std::vector<const Conversation*> rows() const {
        std::vector<const Conversation*> rows;
        for (const auto& [name, c] : conversations) rows.push_back(&c);
        std::stable_sort(rows.begin(), rows.end(), [](const auto* a, const auto* b) {
            auto rank = [](const Conversation* c) {
                return c->name.empty() ? 0 : c->online ? 1 : 2;
            };
            return rank(a) < rank(b);
        });
        return rows;
    }
    std::vector<std::string> online() const {
        std::vector<std::string> names;
        for (const auto& [name, c] : conversations)
            if (!name.empty() && c.online) names.push_back(name);
        return names;
    }
    void all_offline() {
        connected = false;
        for (auto& [name, c] : conversations) c.online = false;
    }
    unsigned unread() const {
        unsigned sum = 0;
        for (const auto& [name, c] : conversations) sum += c.unread;
        return sum;
    }
    std::string subtitle() const {
        const Conversation& c = shown();
        if (!connected) return "no connection";
        if (current.empty()) {
            std::size_t here = online().size();
            return here == 0   ? "nobody else is online"
                   : here == 1 ? "one other person is online"
                               : concat(here, " others are online");
        }
        return concat(c.online ? "online" : "offline",
                      !c.is_trusted() ? " \u00b7 not trusted"
                      : c.verified    ? " \u00b7 verified"
                                      : "",
                      c.ignored ? " \u00b7 ignored" : "");
    }

    // What is known last of a file. Those of long ago go, as messages do.
    void set_card(const FileEvent& e) {
        if (cards_.size() > Conversation::scrollback)
            std::erase_if(cards_, [](const auto& card) { return actions_of(card.second).empty(); });
        cards_[e.file.number] = e;
    }
    const FileEvent* card(unsigned number) const {
        auto found = cards_.find(number);
        return found == cards_.end() ? nullptr : &found->second;
    }
    // Whether a file would be cut off by leaving, or an offer withdrawn.
    bool is_any_open() const {
        return std::any_of(cards_.begin(), cards_.end(),
                           [](const auto& card) { return !is_over(card.second); });
    }
    std::vector<std::string> half_typed() const {
        std::vector<std::string> names;
        for (const auto& [name, c] : conversations)
            if (!c.draft.empty()) names.push_back(c.title());
        return names;
    }
    // Who is here and does not read what is said to everybody, because they are not trusted.
    std::vector<std::string> left_out() const {
        std::vector<std::string> names;
        for (const auto& [name, c] : conversations)
            if (c.online && !c.is_trusted()) names.push_back(name);
        return names;
    }

    // Those who have left and never said a word: a server may announce names without end. (Called
    // where nobody holds a reference to a conversation.)
    void forget_strangers() {
        if (conversations.size() < forget_at_) return;
        std::erase_if(conversations, [&](const auto& entry) {
            const auto& [name, c] = entry;
            return !name.empty() && name != current && !c.online && c.is_trusted() &&
                   c.entries.empty();
        });
        forget_at_ = 2 * conversations.size() + 1000;
    }

  private:
    std::size_t forget_at_ = 5000;         // so many are too many
    std::map<unsigned, FileEvent> cards_;  // by number
};

std::string describe(const FileEvent& card) {
    using enum FileEvent::Phase;
    using chatsecure::readable_size;
    std::string size = readable_size(card.file.size), point = " \u00b7 ";
    if (card.phase == offered) return concat(card.file.user, " offers a file", point, size);
    if (card.phase == offer_sent) return concat(size, point, "waits for ", card.file.user);
    if (card.phase == interrupted || card.phase == stopped)
        return concat(size, point, visible(card.sentence));
    if (card.phase == finished)
        return card.file.sending
                   ? concat("Sent \u2713", point, size)
                   : concat("Saved \u2713", point, size, point, visible(card.path.string()));
    return card.phase == progress ? chatsecure::progress_text(card) : size;
}

// ---- What the windows want done -----------------------------------------------------------------

struct SignInForm {
    std::string server, user;
    chatsecure::SecretBytes password;
    bool register_account = false;
};

// The App does it.
class Wishes {
  public:
    virtual void submit(const SignInForm& form) = 0;
    virtual void answer_key(bool accept) = 0;
    virtual void choose(const std::string& name) = 0;     // a conversation
    virtual bool send_line(const std::string& line) = 0;  // false: not taken
    virtual void reply(const std::string& user) = 0;
    virtual void press(Action action, unsigned file) = 0;
    virtual void open_link(const std::string& address) = 0;
    virtual void drop_files(const std::string& text) = 0;  // addresses or paths, one a line
    virtual void send_file() = 0;
    virtual void toggle_details() = 0;
    virtual void settle() = 0;          // the identity that Details shows was compared
    virtual void toggle_ignored() = 0;  // whom Details shows
    virtual void zoom(int by) = 0;
    virtual std::vector<MenuLine> menu() = 0;
    virtual void close() = 0;
    virtual void drawn() = 0;  // the places of things may have changed

  protected:
    ~Wishes() = default;
};

// ---- The conversation in the middle -------------------------------------------------------------
//
// Only what is visible is ever laid out and drawn, from an anchor: the newest entry at the bottom,
// or, while somebody reads back, a certain entry at the top. So a message costs the same whether it
// is the tenth or the fifty-thousandth, and a resize re-wraps one screenful.
//
//      | edge   text_edge                                          |
//      | (B)    bob  10:32                                         |
//      |        [ a bubble         ]                               |
//      |                                          [ one of ours  ] |

class ConversationView : public Fl_Widget {
  public:
    // Something that can be pressed: a button of a card (by the card's number: cards come and go,
    // and nobody shall accept a file by pressing Enter for another one), or a link (by the number
    // of its entry, and where in its text it begins).
    struct Target {
        Action action{};
        std::size_t number = 0, at = 0;
        friend bool operator==(const Target&, const Target&) = default;
    };
    ConversationView(Model& model, Wishes& wishes)
        : Fl_Widget(0, 0, 0, 0, "view"),
          model_(model),
          wishes_(wishes),
          conversation_(&model.person("")) {}

    void show_conversation(Conversation* conversation) {
        conversation_ = conversation;
        dropped_ = conversation->dropped;
        jump_to_end();
        drag_ = Drag::none;
        selection_.reset();
        focused_.reset();
        rows_.clear();
        places_.clear();
    }
    // Something was added to the conversation; perhaps its oldest entry is gone for that. Whoever
    // writes wants to see it.
    void update(bool own) {
        if (own) jump_to_end();
        for (; dropped_ < conversation_->dropped; ++dropped_) {
            if (top_ == 0) above_ = 0;
            top_ -= std::min<std::size_t>(top_, 1);
        }
        redraw();
    }
    bool is_at_end() const { return at_end_; }

    // Where the buttons and links are: for the mouse, the keyboard, and for tests.
    struct Place {
        Target target;
        int x, y, w, h;
        bool holds(int px, int py) const { return px >= x && px < x + w && py >= y && py < y + h; }
    };
    // By name, for tests; and where texts begin.
    std::vector<std::pair<std::string, Place>> places() const {
        std::vector<std::pair<std::string, Place>> all;
        for (const Place& place : places_)
            all.emplace_back(concat(label_of(place.target.action), "-", place.target.number),
                             place);
        if (shown_ < count()) all.emplace_back("bar", handle_of_bar());
        for (const Row& row : rows_)
            if (row.begin == 0 && row.entry >= conversation_->dropped)
                all.emplace_back("text " + chatsecure::visible(entry_of(row.entry).text),
                                 Place{{}, row.x, row.y, 2 * gap, row.h});
        return all;
    }

    void draw() override {
        bool was_at_end = at_end_;
        fl_push_clip(x(), y(), w(), h());
        fl_color(ink::window);
        fl_rectf(x(), y(), w(), h());
        places_.clear();
        rows_.clear();
        jump_ = {};
        fl_push_clip(x(), y(), w(), room());
        draw_entries();
        fl_pop_clip();
        if (!at_end_) draw_jump();
        fl_pop_clip();
        if (Fl::focus() == this && focused_place() == places_.size()) {
            fl_color(ink::accent);
            fl_rect(x() + 1, y() + 1, w() - 2, h() - 2);
        }
        if (at_end_ != was_at_end) return draw();  // read to the end: now from the other anchor
        if (Place bar = handle_of_bar(); shown_ < count())
            draw_round(bar.x, bar.y, bar.w, bar.h, 2, drag_ == Drag::bar ? ink::quiet : ink::line);
    }

    int handle(int event) override {
        switch (event) {
            case FL_FOCUS:
            case FL_UNFOCUS:  // a key has brought it: to what it can press
                if (event == FL_FOCUS && Fl::event() != FL_KEYBOARD)
                    focused_.reset();
                else if (event == FL_FOCUS && focused_place() == places_.size() && !places_.empty())
                    focused_ = places_.back().target;
                redraw();
                return 1;
            case FL_PUSH:
                return push();
            case FL_DRAG:
            case FL_RELEASE:  // the last motion may come as a release only
                if (drag_ == Drag::bar) drag_bar(Fl::event_y());
                if (drag_ == Drag::selection && Fl::event_is_click() == 0)
                    selection_->second = point_at(Fl::event_x(), Fl::event_y());
                redraw();
                if (event == FL_DRAG) return 1;
                return std::exchange(drag_, Drag::none) == Drag::selection ? release() : 1;
            case FL_MOUSEWHEEL:
                scroll_by(Fl::event_dy() * 3 * line_height());
                return 1;
            case FL_KEYBOARD:
                if (!is_window_key() && key()) return 1;
                break;
            case FL_PASTE:
                wishes_.drop_files(
                    std::string(Fl::event_text(), static_cast<std::size_t>(Fl::event_length())));
                return 1;
            default:
                if (event >= FL_DND_ENTER && event <= FL_DND_RELEASE) return 1;
        }
        return Fl_Widget::handle(event);
    }
    void scroll_pages(int pages) { scroll_by(pages * (h() - 2 * line_height())); }

  private:
    static constexpr int padding = 10;

    // A line of text as it was drawn, or a card: what a mouse can point at.
    struct Row {
        std::size_t entry;  // counted from the first ever
        std::size_t begin, end;
        int x, y, h;
    };
    struct Point {
        std::size_t entry = 0, at = 0;
        friend auto operator<=>(const Point&, const Point&) = default;
    };

    static int line_height() { return scaled(text_size + 6); }
    static int small_step() { return scaled(small_size + 5); }
    static int avatar() { return scaled(28); }
    std::size_t count() const { return conversation_->entries.size(); }
    int room() const { return h() - (at_end_ ? 0 : scaled(28) + gap); }  // the rest: "Newest"
    int edge() const { return x() + margin; }
    int text_edge() const { return edge() + avatar() + gap; }
    int right_edge() const { return x() + w() - margin; }
    int inner() const { return right_edge() - text_edge(); }
    int bubble_width() const { return std::max(inner() * 5 / 6 - 2 * padding, 80); }
    Entry& entry_of(std::size_t number) const {
        return conversation_->entries[number - conversation_->dropped];
    }

    // ---- Layout ---------------------------------------------------------------------------------

    int height_of(Entry& entry) {
        bool message = entry.kind == Entry::Kind::message;
        const FileEvent* card = model_.card(entry.file);
        if (std::string story = card == nullptr ? "" : describe(*card); card && entry.text != story)
            entry.text = story, entry.laid_out_for = -1;
        int width = message ? bubble_width() : card != nullptr ? card_room() : inner();
        if (entry.laid_out_for != width * 1000 + style.zoom) {
            use_font(message ? text_size : small_size);
            entry.lines = wrap(entry.text, width);
            entry.links = chatsecure::find_links(entry.text);
            entry.laid_out_for = width * 1000 + style.zoom;
            entry.widest = 0;
            for (const Span& line : entry.lines)
                entry.widest = std::max(entry.widest, width_of(part(entry, line)));
        }
        int height = (entry.new_day ? day_height() : 0) +
                     (entry.is_said() && entry.first ? head_height() : 0);
        int lines = static_cast<int>(entry.lines.size());
        if (entry.kind == Entry::Kind::file) return height + card_height(entry, card) + gap / 2;
        if (!message) return height + lines * small_step() + 6;
        return height + lines * line_height() + padding + 3;
    }
    static int day_height() { return scaled(small_size) + 3 * gap; }
    static int head_height() { return scaled(small_size) + 12; }

    // Sets the anchor, top_ and above_: where it was left, or so that the newest is at the bottom.
    void find_top() {
        if (!at_end_) {
            top_ = std::min(top_, count() - 1);
            return;
        }
        int left = h() - gap;
        top_ = count();
        while (top_ > 0 && left > 0) left -= height_of(conversation_->entries[--top_]);
        above_ = std::max(-left, 0);
        lead_ = std::max(left, 0);  // fewer entries than fit: they stand at the bottom
    }

    // ---- Drawing --------------------------------------------------------------------------------

    void draw_entries() {
        find_top();
        int at = first_y();
        shown_ = 0;
        for (std::size_t i = top_; i < count() && at < y() + room(); ++i, ++shown_) {
            Entry& entry = conversation_->entries[i];
            int next = at + height_of(entry);
            if (entry.new_day) draw_day(entry, at);
            if (entry.is_said() && entry.first) draw_head(entry, at);
            if (entry.kind == Entry::Kind::file)
                draw_file(entry, i + conversation_->dropped, at);
            else if (entry.kind == Entry::Kind::message)
                draw_message(entry, i + conversation_->dropped, at);
            else
                draw_system(entry, i + conversation_->dropped, at);
            at = next;
        }
        if (!at_end_ && top_ + shown_ == count() && at <= y() + room()) jump_to_end();
    }
    int first_y() const { return y() + (at_end_ ? lead_ - above_ : -above_); }

    void draw_day(const Entry& entry, int& at) {
        use_font(small_size);
        std::string day = day_text(entry.time);
        int wide = width_of(day), middle = (text_edge() + right_edge()) / 2;
        int line = at + day_height() / 2;
        fl_color(ink::line);
        fl_line(text_edge(), line, middle - wide / 2 - gap, line);
        fl_line(middle + wide / 2 + gap, line, right_edge(), line);
        fl_color(ink::quiet);
        draw_at(day, middle - wide / 2, line + scaled(small_size) / 3);
        at += day_height();
    }

    // Who, and when: above the first of a group.
    void draw_head(const Entry& entry, int& at) {
        int base = at + scaled(small_size) + 7, left = text_edge();
        std::string time = chatsecure::time_text(entry.time, "%H:%M");
        use_font(small_size);
        if (entry.own) {
            left = right_edge() - width_of(time);
        } else {
            draw_avatar(entry.from, edge(), at + 6, avatar());
            use_font(small_size, bold);
            fl_color(colour_of(entry.from));
            draw_at(entry.from, left, base);
            left += width_of(entry.from) + gap;
        }
        use_font(small_size);
        fl_color(ink::quiet);
        draw_at(time, left, base);
        at += head_height();
    }

    void draw_message(const Entry& entry, std::size_t number, int at) {
        int wide = std::min(entry.widest, bubble_width()) + 2 * padding;
        int left = entry.own ? right_edge() - wide : text_edge();
        // X11 counts pixels in 16 bits: what is far outside must not be drawn, or it is seen here.
        int bottom = at + static_cast<int>(entry.lines.size()) * line_height() + padding;
        int from = std::max(at, y() - 2 * line_height());
        int to = std::min(bottom, y() + h() + 2 * line_height());
        Fl_Color ground = entry.own ? ink::own : entry.mentions_us ? ink::selected : ink::other;
        draw_round(left, from, wide, to - from, 9, ground);
        if (entry.own && bottom < y() + h() + line_height()) draw_mark(entry, left, bottom);
        use_font(text_size);
        draw_lines(entry, number, left + padding, at + padding / 2, line_height(), ink::text);
    }

    // To the left of the bubble, at its last line; with the reason, if there is room.
    void draw_mark(const Entry& entry, int right, int bottom) {
        using enum chatsecure::Delivery;
        use_font(small_size, entry.state == failed ? bold : plain);
        fl_color(entry.state == failed ? ink::warning : ink::quiet);
        std::string text = entry.state ? chatsecure::delivery_mark(*entry.state) : "";
        std::string all = entry.reason.empty() ? text : concat(text, " ", entry.reason);
        if (width_of(all) < right - edge() - gap) text = all;
        draw_at(text, right - width_of(text) - 6, bottom - padding / 2 - 5);
    }

    void draw_system(const Entry& entry, std::size_t number, int at) {
        use_font(small_size);
        draw_lines(entry, number, text_edge(), at + 3, small_step(),
                   entry.kind == Entry::Kind::warning ? ink::warning : ink::quiet);
    }

    // Of a card, the text may have become a shorter one since `line` was laid out.
    static std::string_view part(const Entry& entry, const Span& line) {
        std::size_t begin = std::min(line.begin, entry.text.size());
        return std::string_view(entry.text).substr(begin, std::max(line.end, begin) - begin);
    }

    void draw_lines(const Entry& entry, std::size_t number, int left, int at, int step,
                    Fl_Color colour) {
        int hidden = std::max((y() - at) / step, 0);  // lines that are not seen
        auto first = std::min(static_cast<std::size_t>(hidden), entry.lines.size());
        at += static_cast<int>(first) * step;
        for (std::size_t i = first; i < entry.lines.size() && at < y() + h(); ++i) {
            const Span& line = entry.lines[i];
            draw_selection(number, line, part(entry, line), left, at, step);
            draw_line(entry, number, line, left, at, step, colour);
            rows_.push_back({number, line.begin, line.end, left, at, step});
            at += step;
        }
    }
    // With its links: a link that is wrapped has a place in each of its lines.
    void draw_line(const Entry& entry, std::size_t number, const Span& line, int left, int at,
                   int step, Fl_Color colour) {
        int base = at + step - fl_descent() - 2;
        std::size_t drawn = line.begin;
        auto draw_to = [&](std::size_t end, Fl_Color in) {
            std::string_view text = part(entry, {drawn, end});
            fl_color(in);
            draw_at(text, left, base);
            left += width_of(text);
            drawn = end;
        };
        for (const Span& link : entry.links) {
            std::size_t begin = std::max(link.begin, drawn), end = std::min(link.end, line.end);
            if (begin >= end) continue;
            draw_to(begin, colour);
            int from = left;
            draw_to(end, ink::accent);
            Target target{Action::open_link, number, link.begin};
            bool focus = Fl::focus() == this && focused_ == target;
            fl_rectf(from, base + 2, left - from, focus ? 3 : 1);
            places_.push_back({target, from, at, left - from, step});
        }
        draw_to(line.end, colour);
    }

    void draw_selection(std::size_t number, const Span& line, std::string_view text, int left,
                        int at, int step) {
        if (!selection_) return;
        auto [from, to] = std::minmax(selection_->first, selection_->second);
        Point begin{number, line.begin}, end{number, line.end};
        if (to <= begin || from >= end) return;
        std::size_t first = from > begin ? from.at - line.begin : 0;
        std::size_t last = to < end ? to.at - line.begin : text.size();
        int offset = width_of(text.substr(0, first));
        int wide = width_of(text.substr(first, last - first));
        draw_round(left + offset, at, wide, step, 3, ink::selected);
    }

    int card_width() const { return std::min(inner(), scaled(440)); }
    int card_room() const { return card_width() - scaled(30) - gap - 2 * padding; }  // for text
    static int card_height(const Entry& entry, const FileEvent* card) {
        if (card == nullptr) return 0;
        int text = scaled(text_size) + static_cast<int>(entry.lines.size()) * small_step();
        return text + 23 + (has_bar(*card) ? 16 : 0) +
               (actions_of(*card).empty() ? 0 : scaled(26) + gap);
    }
    void draw_file(const Entry& entry, std::size_t number, int at) {
        const FileEvent* card = model_.card(entry.file);
        if (card == nullptr) return;
        int wide = card_width(), high = card_height(entry, card), room = card_room();
        int left = entry.own ? right_edge() - wide : text_edge(),
            text_x = left + wide - padding - room;
        rows_.push_back({number, 0, 0, left, at, high});
        draw_round(left, at, wide, high, 9, ink::line);
        draw_round(left + 1, at + 1, wide - 2, high - 2, 8, ink::panel);
        draw_icon(card->file.name, left + padding, at + padding);
        fl_color(ink::text);
        use_font(text_size, bold);
        draw_text(chatsecure::visible(card->file.name), text_x, at + scaled(text_size) + 7, room);
        use_font(small_size);
        int below = at + scaled(text_size) + 12;
        draw_lines(entry, number, text_x, below, small_step(),
                   card->phase == FileEvent::Phase::stopped ? ink::warning : ink::quiet);
        below += static_cast<int>(entry.lines.size()) * small_step() + 8;
        if (has_bar(*card)) {
            double share = static_cast<double>(card->done) /
                           static_cast<double>(std::max<std::uint64_t>(card->file.size, 1));
            draw_round(text_x, below, room, 8, 4, ink::line);
            int full = static_cast<int>(share * room);
            if (full > 7) draw_round(text_x, below, full, 8, 4, ink::accent);
            below += 16;
        }
        for (Action action : actions_of(*card)) draw_action(action, entry.file, text_x, below);
    }

    // A sheet of paper in the colour of its kind, with the end of its name.
    static void draw_icon(const std::string& name, int left, int at) {
        std::string end = std::filesystem::path(name).extension().string();
        Fl_Color paper = end.empty() ? ink::quiet : colour_of(end);
        int wide = scaled(30), high = scaled(34);
        draw_round(left, at, wide, high, 4, paper);
        fl_color(ink::panel);
        fl_polygon(left + wide - 8, at, left + wide, at, left + wide, at + 8);
        use_font(end.size() > 4 ? 8 : 10, bold);
        std::string label =
            fitting(end.size() > 1 ? chatsecure::visible(end.substr(1)) : "file", wide - 2);
        fl_draw(label.c_str(), left, at + 6, wide, high - 6, FL_ALIGN_CENTER, nullptr, 0);
    }

    void draw_action(Action action, unsigned file, int& button_x, int at) {
        use_font(small_size, bold);
        int wide = width_of(label_of(action)) + 24, high = scaled(26);
        draw_face(button_x, at, wide, high, label_of(action), action == Action::save,
                  Fl::focus() == this && focused_ == Target{action, file});
        places_.push_back({{action, file}, button_x, at, wide, high});
        button_x += wide + gap;
    }

    // "Newest": while somebody reads back, below what they read.
    void draw_jump() {
        use_font(small_size, bold);
        const char* text = "\u2193  Newest";
        int wide = width_of(text) + 24, high = scaled(28);
        jump_ = {{}, right_edge() - wide, y() + h() - high, wide, high};
        draw_round(jump_.x, jump_.y, wide, high, high / 2, ink::accent);
        fl_color(ink::on_accent);
        fl_draw(text, jump_.x, jump_.y, wide, high, FL_ALIGN_CENTER, nullptr, 0);
    }

    // ---- Scrolling ------------------------------------------------------------------------------

    // Where in all of it we are.
    Place handle_of_bar() const {
        double one = static_cast<double>(h()) / static_cast<double>(count() + 1);
        int high = std::max(static_cast<int>(one * static_cast<double>(shown_)), 24);
        int top = at_end_ ? h() : static_cast<int>(one * static_cast<double>(top_));
        return {{}, x() + w() - 7, y() + std::min(top, h() - high), 5, high};
    }
    void drag_bar(int my) {
        int top = std::max(my - grip_ - y(), 0);
        if (top >= h() - handle_of_bar().h) return jump_to_end();
        double wanted = static_cast<double>(top) / h() * static_cast<double>(count());
        at_end_ = false;
        top_ = static_cast<std::size_t>(wanted);
        double rest = wanted - static_cast<double>(top_);
        above_ = static_cast<int>(rest * height_of(conversation_->entries[top_]));
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
        redraw();
    }

    // ---- Mouse and keys -------------------------------------------------------------------------

    int push() {
        int mx = Fl::event_x(), my = Fl::event_y();
        const Place* place = place_at(mx, my);
        bool button = place != nullptr && place->target.action != Action::open_link;
        if (!button) take_focus();  // a button leaves the keyboard with whom it was
        if (Fl::event_button() == FL_RIGHT_MOUSE)
            return show_menu(point_at(mx, my).entry, mx, my), 1;
        if (!at_end_ && jump_.holds(mx, my)) return jump_to_end(), 1;
        if (mx > right_edge() && shown_ < count()) {
            Place bar = handle_of_bar();
            grip_ = my >= bar.y && my < bar.y + bar.h ? my - bar.y : bar.h / 2;
            drag_ = Drag::bar;
            return drag_bar(my), 1;
        }
        if (button) {
            if (Fl::event_clicks() == 0) press(place->target);  // "Open" comes where "Save" was
            return 1;
        }
        Point point = point_at(mx, my);
        selection_ = {point, point};
        if (Fl::event_clicks() > 0) select_word(point);
        drag_ = Drag::selection;
        redraw();
        return 1;
    }
    // A link is opened by a click, not by the end of a selection.
    int release() {
        if (selection_->first != selection_->second) return copy_selection(0), 1;
        const Place* place = place_at(Fl::event_x(), Fl::event_y());
        if (place != nullptr) press(place->target);
        return 1;
    }
    void press(Target target) {
        if (target.action != Action::open_link)
            return wishes_.press(target.action, static_cast<unsigned>(target.number));
        if (target.number < conversation_->dropped) return;  // gone since it was drawn
        const Entry& entry = entry_of(target.number);
        for (const Span& link : entry.links)
            if (link.begin == target.at) return wishes_.open_link(std::string(part(entry, link)));
    }
    const Place* place_at(int mx, int my) const {
        for (const Place& place : places_)
            if (place.holds(mx, my)) return &place;
        return nullptr;
    }
    void show_menu(std::size_t number, int mx, int my) {
        if (rows_.empty() || number < conversation_->dropped) return;
        const Entry& entry = entry_of(number);
        std::vector<MenuLine> lines;
        if (entry.kind != Entry::Kind::file)
            lines.push_back({"Copy", [this, text = entry.text] {
                                 if (!copy_selection(1)) copy(text, 1);
                             }});
        if (entry.is_said() && !entry.own)
            lines.push_back({"Reply", [this, who = entry.from] { wishes_.reply(who); }});
        if (const FileEvent* card = model_.card(entry.file); card != nullptr)
            for (Action action : actions_of(*card))
                lines.push_back({label_of(action), [this, action, file = entry.file] {
                                     wishes_.press(action, file);
                                 }});
        if (!lines.empty()) pop_up(lines, mx, my);
    }

    // The place in the text that is nearest to a point of the window.
    Point point_at(int mx, int my) const {
        const Row* best = nullptr;
        for (const Row& row : rows_)  // as drawn last: the oldest may have gone since
            if (row.entry >= conversation_->dropped && (best == nullptr || my >= row.y))
                best = &row;
        if (best == nullptr) return {};
        const Entry& entry = entry_of(best->entry);
        use_font(entry.kind == Entry::Kind::message ? text_size : small_size);
        std::string_view text = part(entry, {best->begin, best->end});
        std::size_t at = 0;
        for (std::string_view left = text; !left.empty() && my < best->y + best->h;) {
            std::size_t next = at + take_letter(left).size();
            int middle = (width_of(text.substr(0, at)) + width_of(text.substr(0, next))) / 2;
            if (mx < best->x + middle) return {best->entry, best->begin + at};
            at = next;
        }
        return {best->entry, my < best->y + best->h ? best->begin + at : best->end};
    }

    void select_word(Point point) {
        if (point.entry < conversation_->dropped || rows_.empty()) return;
        const std::string& text = entry_of(point.entry).text;
        std::size_t before = point.at == 0 ? text.npos : text.find_last_of(" \n", point.at - 1);
        std::size_t after = std::min(text.find_first_of(" \n", point.at), text.size());
        selection_ = {{point.entry, before == text.npos ? 0 : before + 1}, {point.entry, after}};
    }
    std::string selected() const {
        std::string text;
        if (!selection_) return text;
        auto [from, to] = std::minmax(selection_->first, selection_->second);
        for (std::size_t n = std::max(from.entry, conversation_->dropped);
             n <= to.entry && n - conversation_->dropped < count(); ++n) {
            const Entry& entry = entry_of(n);
            std::size_t begin = n == from.entry ? from.at : 0;
            std::size_t end = n == to.entry ? to.at : entry.text.size();
            if (!text.empty()) text += '\n';
            text += part(entry, {begin, end});
        }
        return text;
    }
    static void copy(const std::string& text, int where) {
        Fl::copy(text.data(), static_cast<int>(text.size()), where);
    }
    bool copy_selection(int where) {  // 0: what the middle button pastes; 1: what Ctrl-V does
        std::string text = selected();
        if (!text.empty()) copy(text, where);
        return !text.empty();
    }

    bool key() {
        int key = Fl::event_key();
        if (key == FL_Up || key == FL_Down)
            scroll_by((key == FL_Up ? -2 : 2) * line_height());
        else if (key == FL_Page_Up || key == FL_Page_Down)
            scroll_pages(key == FL_Page_Up ? -1 : 1);
        else if (key == FL_Home)
            at_end_ = false, top_ = 0, above_ = 0, redraw();
        else if (key == FL_End)
            jump_to_end();
        else if (key == FL_Left || key == FL_Right)
            move_focus(key == FL_Left ? -1 : 1);
        else if (key == FL_Menu)
            show_menu(point_at(x(), y() + h()).entry, text_edge(), y() + h() / 2);
        else if (key == 'c' && Fl::event_command() != 0)
            copy_selection(1);
        else if ((is_enter() || key == ' ') && focused_place() < places_.size())
            press(*focused_);
        else
            return false;
        return true;
    }

    // What Enter presses, if it can be seen; otherwise places_.size().
    std::size_t focused_place() const {
        auto found = std::find_if(places_.begin(), places_.end(),
                                  [&](const Place& place) { return focused_ == place.target; });
        return static_cast<std::size_t>(found - places_.begin());
    }
    void move_focus(int by) {
        std::size_t n = places_.size(), at = focused_place();
        if (n == 0) return;
        if (at == n) at = by > 0 ? n - 1 : 0;
        for (std::size_t i = 0; i < n; ++i) {  // the lines of a wrapped link are one target
            at = (at + (by > 0 ? 1 : n - 1)) % n;
            if (focused_ != places_[at].target) break;
        }
        focused_ = places_[at].target;
        redraw();
    }

    const Model& model_;
    Wishes& wishes_;
    Conversation* conversation_;
    bool at_end_ = true;       // then the two that follow are computed anew at each drawing
    std::size_t top_ = 0;      // the entry at the top, counted from the oldest that is there
    int above_ = 0;            // pixels of it that are above the edge
    int lead_ = 0;             // pixels that are free above the first entry
    std::size_t dropped_ = 0;  // of the conversation, when top_ was right
    std::size_t shown_ = 0;    // entries that were drawn

    std::vector<Row> rows_;
    std::vector<Place> places_;
    Place jump_{};
    std::optional<Target> focused_;
    std::optional<std::pair<Point, Point>> selection_;
    enum class Drag { none, selection, bar } drag_ = Drag::none;  // what the mouse holds
    int grip_ = 0;  // and where, below the upper end of the bar
};

// ---- The list on the left -----------------------------------------------------------------------

class PeopleList : public Fl_Widget {
  public:
    PeopleList(const Model& model, Wishes& wishes)
        : Fl_Widget(0, 0, 0, 0), model_(model), wishes_(wishes) {}

    static int row_height() { return scaled(44); }
    std::vector<const Conversation*> rows() const { return model_.rows(); }

    void draw() override {
        fl_push_clip(x(), y(), w(), h());
        fl_color(ink::panel);
        fl_rectf(x(), y(), w(), h());
        int at = y() + gap - scroll_;
        for (const Conversation* c : model_.rows()) {
            if (at + row_height() > y() && at < y() + h()) draw_row(*c, at);
            at += row_height();
        }
        fl_pop_clip();
    }

    int handle(int event) override {
        std::vector<const Conversation*> rows = model_.rows();
        switch (event) {
            case FL_FOCUS:
            case FL_UNFOCUS:
                redraw();
                return 1;
            case FL_PUSH: {  // leaves the keyboard with whom it was
                auto row = static_cast<std::size_t>(Fl::event_y() - y() - gap + scroll_) /
                           static_cast<std::size_t>(row_height());
                if (row >= rows.size()) return 1;
                wishes_.choose(rows[row]->name);
                if (Fl::event_button() == FL_RIGHT_MOUSE) show_menu(Fl::event_x(), Fl::event_y());
                return 1;
            }
            case FL_MOUSEWHEEL: {
                int all = static_cast<int>(rows.size()) * row_height() + 2 * gap;
                scroll_ =
                    std::clamp(scroll_ + Fl::event_dy() * row_height(), 0, std::max(all - h(), 0));
                redraw();
                return 1;
            }
            case FL_KEYBOARD:
                if (Fl::event_key() == FL_Menu)
                    return show_menu(x() + w() / 2, row_y(chosen_row()) + row_height()), 1;
                if (Fl::event_key() != FL_Up && Fl::event_key() != FL_Down) return 0;
                return step(Fl::event_key() == FL_Down ? 1 : -1), 1;
            default:
                return Fl_Widget::handle(event);
        }
    }

    // Chooses the next conversation, or the one before.
    void step(int by) {
        std::vector<const Conversation*> rows = model_.rows();
        int row = std::clamp(chosen_row() + by, 0, static_cast<int>(rows.size()) - 1);
        scroll_ = std::clamp(scroll_, std::max((row + 1) * row_height() + 2 * gap - h(), 0),
                             row * row_height());
        wishes_.choose(rows[static_cast<std::size_t>(row)]->name);
    }

  private:
    int row_y(int row) const { return y() + gap - scroll_ + row * row_height(); }
    int chosen_row() const {
        std::vector<const Conversation*> rows = model_.rows();
        auto chosen = std::find_if(rows.begin(), rows.end(), [&](const Conversation* c) {
            return c->name == model_.current;
        });
        return static_cast<int>(chosen - rows.begin());
    }
    // What can be done with whoever is chosen.
    void show_menu(int mx, int my) {
        if (model_.current.empty()) return;
        pop_up({{"Details", [this] { wishes_.toggle_details(); }},
                {"Offer a file\u2026", [this] { wishes_.send_file(); }},
                {model_.shown().ignored ? "Ignore no longer" : "Ignore",
                 [this] { wishes_.toggle_ignored(); }}},
               mx, my);
    }
    // In a narrow window there is room for the faces only.
    void draw_row(const Conversation& c, int at) {
        bool current = c.name == model_.current, narrow = w() < 100;
        int high = row_height() - 2, face = scaled(28);
        if (current) {
            bool focus = Fl::focus() == this;
            if (focus) draw_round(x() + 4, at, w() - 8, high, 8, ink::accent);
            int edge = focus ? 2 : 0;
            draw_round(x() + 4 + edge, at + edge, w() - 8 - 2 * edge, high - 2 * edge, 7, ink::own);
        }
        int left = narrow ? x() + (w() - face) / 2 : x() + margin, top = at + (high - face) / 2;
        draw_avatar(c.name, left, top, face);
        if (!c.name.empty()) {  // a dot at the face: who is online
            draw_disc(left + face - 9, top + face - 9, 12, current ? ink::own : ink::panel);
            draw_disc(left + face - 7, top + face - 7, 8, c.online ? ink::online : ink::line);
        }
        int right = x() + w() - margin, base = at + high / 2 + scaled(text_size) / 3;
        if (c.unread > 0) {
            use_font(small_size, bold);
            std::string number = c.unread > 99 ? "99+" : std::to_string(c.unread);
            int tall = scaled(18), wide = std::max(width_of(number) + 10, tall + 2);
            right = narrow ? x() + w() - 4 - wide : right - wide;
            int badge = narrow ? at : at + (high - tall) / 2;
            draw_round(right, badge, wide, tall, tall / 2, ink::accent);
            fl_color(ink::on_accent);
            fl_draw(number.c_str(), right, badge, wide, tall, FL_ALIGN_CENTER, nullptr, 0);
        }
        if (!c.is_trusted() || c.verified) {
            use_font(narrow ? small_size : text_size, bold);
            right = narrow ? x() + 8 : right - scaled(16);
            fl_color(c.is_trusted() ? ink::online : ink::warning);
            draw_at(c.is_trusted() ? "\u2713" : "!", right, narrow ? at + scaled(14) : base);
        }
        use_font(text_size, c.unread > 0 || c.name.empty() ? bold : plain);
        fl_color(c.online || c.name.empty() || current ? ink::text : ink::quiet);
        int name_x = left + face + gap + 2, room = narrow ? 0 : right - name_x - 4;
        if (!narrow) draw_text(c.title(), name_x, base, room);
        if (!c.ignored) return;  // crossed out: the name, or the face if there is nothing else
        fl_color(ink::warning);
        if (narrow)
            fl_rectf(left - 3, at + high / 2 - 1, face + 6, 3);
        else
            fl_rectf(name_x - 3, at + high / 2, std::min(width_of(c.title()), room) + 6, 2);
    }

    const Model& model_;
    Wishes& wishes_;
    int scroll_ = 0;
};

// ---- The input line -----------------------------------------------------------------------------

constexpr Fl_Boxtype message_box = FL_FREE_BOXTYPE;  // with more room around the text than others

class MessageInput : public InputField<Fl_Multiline_Input> {
  public:
    MessageInput(const Model& model, Wishes& wishes, ConversationView& view)
        : InputField("input"), model_(model), wishes_(wishes), view_(view) {
        box(message_box);
        wrap(1);
        maximum_size(2 * static_cast<int>(chatsecure::max_text_bytes));  // more: a sentence says so
        tab_nav(1);
        when(FL_WHEN_CHANGED);  // the callback makes room for it
    }

    // How high it wants to be: one line to six.
    int wanted_height() const {
        use_font(text_size);
        auto lines = static_cast<int>(::wrap(value(), std::max(w() - 24, 40)).size());
        return std::clamp(lines, 1, 6) * (fl_height() + 1) + 14;
    }

    void draw() override {
        InputField::draw();
        if (size() > 0) return;
        use_font(text_size);
        fl_color(ink::quiet);
        const Conversation& c = model_.shown();
        std::string to = c.name.empty() ? "everyone" : c.name;
        bool away = !c.name.empty() && !c.online && model_.connected;
        draw_text(concat("Message ", to, away ? ", who is not online" : ""),
                  x() + Fl::box_dx(box()) + 1,  // where the text will begin
                  y() + Fl::box_dy(box()) + fl_height() - fl_descent(), w() - 20);
    }
    int handle(int event) override {
        if (event == FL_KEYBOARD && is_window_key()) return 0;
        if (event == FL_KEYBOARD && key()) return 1;
        if (event == FL_DND_RELEASE) dropping_ = true;  // FL_PASTE follows, with what was dropped
        if (event == FL_PASTE && std::exchange(dropping_, false)) {
            std::string text(Fl::event_text(), static_cast<std::size_t>(Fl::event_length()));
            if (text.starts_with("file://")) {
                wishes_.drop_files(text);
                return 1;
            }
        }
        int taken = InputField::handle(event);
        if (event == FL_FOCUS) mark(cursor());  // Tab selects nothing: a letter would replace it
        return taken;
    }

    // What was not taken comes back, unless the line has got another text meanwhile.
    void send() {
        std::string text(value());
        if (text.find_first_not_of(" \n") == text.npos) return;
        if (history_.empty() || history_.back() != text) history_.push_back(text);
        if (history_.size() > 200) history_.pop_front();
        at_ = history_.size();
        value("");
        if (!wishes_.send_line(text) && size() == 0) put(text);
        do_callback();
    }

    // Another text, as if it had been typed.
    void put(const std::string& text) {
        value(text.c_str());
        cursor(size());
        do_callback();
    }

  private:
    bool key() {
        int key = Fl::event_key();
        bool shift = (Fl::event_state() & FL_SHIFT) != 0;
        std::string_view before(value(), static_cast<std::size_t>(cursor()));
        if (key == FL_Tab) return !shift && complete();
        if (is_enter()) {
            if (!shift) return send(), true;
            replace(cursor(), mark(), "\n", 1);
            do_callback();
        } else if (key == FL_Page_Up || key == FL_Page_Down) {
            view_.scroll_pages(key == FL_Page_Up ? -1 : 1);
        } else if (key == FL_Up && before.find('\n') == before.npos) {
            recall(-1);
        } else if (key == FL_Down && at_ < history_.size()) {
            recall(1);
        } else {
            return false;
        }
        return true;
    }

    void recall(int by) {
        if (by < 0 && at_ == 0) return;
        if (at_ == history_.size()) draft_ = value();
        at_ = by < 0 ? at_ - 1 : at_ + 1;
        put(at_ < history_.size() ? history_[at_] : draft_);
    }

    // False if there is nothing to complete: then Tab moves on.
    bool complete() {
        std::string before(value(), static_cast<std::size_t>(cursor()));
        if (before.empty() || before.ends_with(' ') || before.ends_with('\n')) return false;
        std::vector<std::string> names;
        for (const auto& [name, c] : model_.conversations)
            if (!name.empty()) names.push_back(name);
        chatsecure::Completion found = chatsecure::complete(before, names);
        if (found.insert.empty()) return found.words.size() > 1;
        mark(cursor());  // what is selected stays
        insert(found.insert.c_str());
        do_callback();
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

    const Model& model_;
    Wishes& wishes_;
    ConversationView& view_;
    bool dropping_ = false;
    std::deque<std::string> history_;
    std::size_t at_ = 0;  // which of them is shown; the number of them: the draft
    std::string draft_;
};

// ---- Helpers for the two windows ----------------------------------------------------------------

// A text that wraps, perhaps on a ground of its own. It is as high as it needs to be.
class Text : public Fl_Box {
  public:
    Text(int size, Fl_Color colour, Fl_Font font = plain, const std::string& text = "",
         Fl_Color ground = ink::window)
        : Fl_Box(0, 0, 0, 0), size_(size) {
        box(ground == ink::window ? FL_NO_BOX : FL_UP_BOX);
        color(ground);
        labelcolor(colour);
        labelfont(font);
        align(FL_ALIGN_TOP | FL_ALIGN_LEFT | FL_ALIGN_INSIDE | FL_ALIGN_WRAP | FL_ALIGN_CLIP);
        set(text);
    }
    void set(const std::string& text) {
        std::string label;  // FLTK draws little pictures for what begins with @
        for (char c : text) label += c == '@' ? "@@" : std::string(1, c);
        copy_label(label.c_str());
        if (window() != nullptr) window()->redraw();
    }
    bool is_empty() const { return *label() == '\0'; }
    int wanted_height(int width) {
        labelsize(scaled(size_));
        int inset = box() == FL_NO_BOX ? 0 : 2 * gap, w = width - inset, h = 0;
        fl_font(labelfont(), labelsize());
        fl_measure(label(), w, h, 0);
        return is_empty() ? 0 : h + inset;
    }
    void draw() override {  // at the very edge, where FLTK leaves 3 pixels
        int inset = box() == FL_NO_BOX ? 0 : gap;
        draw_box();
        draw_label(x() + inset, y() + inset, w() - 2 * inset, h() - 2 * inset);
    }

  private:
    int size_;
};

// Puts widgets below each other. What is hidden, or a text that is empty, takes no room.
struct Column {
    int x, y, w;
    void put(Fl_Widget& widget, int height, int space = gap) {
        if (widget.visible() == 0 || height == 0) return widget.resize(x, y, w, 0);
        widget.resize(x, y, w, height);
        y += height + space;
    }
    void put(Text& text, int space = gap) {
        put(static_cast<Fl_Widget&>(text), text.wanted_height(w), space);
    }
};

void show_if(Fl_Widget& widget, bool yes) { yes ? widget.show() : widget.hide(); }
void activate_if(Fl_Widget& widget, bool yes) { yes ? widget.activate() : widget.deactivate(); }

// The box of a field: flat, with round corners and a thin line; a thick one if it has the focus.
void draw_field_box(int x, int y, int w, int h, Fl_Color colour) {
    const Fl_Widget* f = Fl::focus();
    bool focus = f != nullptr && f->x() == x && f->y() == y && f->w() == w && f->h() == h;
    bool check = h < 30 && w == h;  // the box of a check mark
    int radius = check ? 3 : 6, edge = focus ? 2 : 1;
    draw_round(x, y, w, h, radius, focus ? ink::accent : check ? ink::quiet : ink::line);
    draw_round(x + edge, y + edge, w - 2 * edge, h - 2 * edge, radius - edge, colour);
}

// Shows a window before another one until it is hidden; what goes on behind it goes on.
void show_before(const Fl_Window& parent, Fl_Window& window, Fl_Widget& focus) {
    window.position(parent.x() + (parent.w() - window.w()) / 2,
                    parent.y() + (parent.h() - window.h()) / 2);
    window.color(ink::panel);
    window.set_modal();
    window.show();
    focus.take_focus();
    while (window.shown() != 0) Fl::wait();
}

// Asks in a window before `parent`. Enter and Escape mean `no`.
bool ask(const Fl_Window& parent, const std::string& question, const char* yes, const char* no) {
    const int width = 420;
    bool answer = false;
    Fl_Double_Window window(width, 100, "ChatSecure");
    use_font(text_size);
    std::string lines;  // an address has no spaces where FLTK would break it
    for (const Span& line : wrap(question, width - 50))
        lines += question.substr(line.begin, line.end - line.begin) + '\n';
    Text text(text_size, ink::text, plain, lines);
    Button yes_button(yes, [&] { answer = true, window.hide(); });
    Button no_button(
        no, [&] { window.hide(); }, true);
    window.end();
    int high = text.wanted_height(width - 40), height = high + 84;
    window.size(width, height);
    text.resize(20, 20, width - 40, high);
    yes_button.resize(width - 240, height - 50, 105, 34);
    no_button.resize(width - 125, height - 50, 105, 34);
    show_before(parent, window, no_button);
    return answer;
}

// Asks for a file: by a path that is typed, which Tab and the list below it help to complete.
// (FLTK's own chooser takes no path that begins with /, and GTK's stops our events.)
class FileChooser : public Fl_Double_Window {
  public:
    FileChooser(const std::string& title, const std::filesystem::path& folder)
        : Fl_Double_Window(scaled(460), scaled(340), "ChatSecure"),
          title_(text_size, ink::text, bold, title) {
        end();
        copy_label(title.c_str());
        path_.when(FL_WHEN_CHANGED | FL_WHEN_ENTER_KEY_ALWAYS);
        path_.callback(call<FileChooser, &FileChooser::edited>, this);
        path_.textsize(scaled(text_size));
        list_.type(FL_HOLD_BROWSER);
        list_.format_char(0);
        list_.textsize(scaled(text_size));
        list_.scrollbar.color(ink::panel);
        list_.when(FL_WHEN_CHANGED | FL_WHEN_RELEASE_ALWAYS);
        list_.callback(call<FileChooser, &FileChooser::picked>, this);
        int high = scaled(text_size) + 16, wide = offer_.wanted_width() + gap;
        Column column{margin, margin, w() - 2 * margin};
        column.put(title_);
        column.put(path_, high);
        column.put(list_, h() - column.y - high - scaled(small_size) - 4 * gap);
        error_.resize(margin, column.y, column.w, scaled(small_size) + 4);
        offer_.resize(w() - margin - wide, h() - margin - high, wide, high);
        cancel_.resize(offer_.x() - gap - wide, offer_.y(), wide, high);
        std::error_code failure;
        bool home = std::filesystem::is_directory(chatsecure::path_from("~/"), failure);
        enter(!folder.empty() ? folder.generic_string() : home ? "~" : ".");
        path_.mark(0);  // another path that is typed replaces it
    }
    // The path of a file that is there; empty: none was chosen.
    std::filesystem::path choose(const Fl_Window& parent) {
        show_before(parent, *this, path_);
        return chosen_;
    }

  private:
    bool key_of_path() {
        if (Fl::event_key() == FL_Down) {
            list_.value(std::min(list_.size(), 2));  // the first behind "../"
            picked();
            return list_.take_focus() != 0;
        }
        return Fl::event_key() == FL_Tab && Fl::event_shift() == 0 && complete();
    }
    bool key_of_list() { return is_enter() && (take(), true); }
    bool complete() {
        std::string more = completion().insert;
        if (!more.empty()) set(path_.value() + more);
        return !more.empty();
    }
    chatsecure::Completion completion() const { return chatsecure::complete_path(path_.value()); }
    void set(const std::string& path) {
        path_.value(path.c_str());
        fill();
    }
    void enter(const std::string& folder) { set(folder.ends_with('/') ? folder : folder + '/'); }
    void fill() {
        std::string path = path_.value();
        folder_ = path.substr(0, path.find_last_of(chatsecure::path_separators) + 1);
        error_.set("");
        list_.clear();
        list_.add("../");
        for (const std::string& word : completion().words)
            list_.add(word.substr(folder_.size()).c_str());
    }
    // A path that is typed behind another one replaces it.
    void edited() {
        if (is_enter()) return take();
        std::string path = path_.value();
        std::size_t begin = std::max(path.rfind("//") + 1, path.rfind("/~/") + 1);  // npos + 1 is 0
        if (begin > 0) path_.value(path.substr(begin).c_str());
        fill();
    }
    // Shows what is chosen as the path; a second click takes it.
    void picked() {
        if (list_.value() == 0) return;
        bool twice = Fl::event() != FL_KEYBOARD && Fl::event_clicks() > 0;
        error_.set("");
        path_.value((folder_ + list_.text(list_.value())).c_str());
        if (twice) take();
    }
    void offer() {
        take();
        if (shown() != 0 && error_.is_empty()) error_.set("Choose a file in this folder.");
    }
    void take() {
        Fl::event_clicks(0);  // the next one is for another list
        std::filesystem::path path = chatsecure::path_from(path_.value());
        std::error_code failure;
        if (std::filesystem::is_directory(path, failure)) {
            path = std::filesystem::absolute(path, failure).lexically_normal();  // without ".."
            return enter(path.generic_string());
        }
        if (!std::filesystem::exists(path, failure)) return error_.set("There is no such file.");
        chosen_ = path;
        hide();
    }

    Text title_;
    WithKeys<InputField<Fl_Input>> path_{[this] { return key_of_path(); }, "path"};
    WithKeys<Fl_Hold_Browser> list_{[this] { return key_of_list(); }, 0, 0, 0, 0};
    Text error_{small_size, ink::warning};
    Button cancel_{"Cancel", [this] { hide(); }};
    Button offer_{"Offer", [this] { offer(); }, true};
    std::string folder_;  // that is listed
    std::filesystem::path chosen_;
};

// A fingerprint in pieces that an eye can compare.
std::string grouped(const chatsecure::Fingerprint& fingerprint) {
    std::string text = fingerprint.text(), out = "SHA256:";
    for (std::size_t i = 7; i < text.size(); i += 8) out += " " + text.substr(i, 8);
    return out;
}

// ---- Signing in ---------------------------------------------------------------------------------

class SignIn : public Fl_Double_Window {
  public:
    explicit SignIn(Wishes& wishes) : Fl_Double_Window(420, 480, "ChatSecure"), wishes_(wishes) {
        end();
        color(ink::window);
        for (Fl_Input* field : fields()) {
            field->when(FL_WHEN_CHANGED | FL_WHEN_ENTER_KEY_ALWAYS);
            field->callback(call<SignIn, &SignIn::edited>, this);
        }
        show_password_.callback(call<SignIn, &SignIn::layout>, this);
        register_.callback(call<SignIn, &SignIn::layout>, this);
        callback([](Fl_Widget*, void* w) { static_cast<Wishes*>(w)->close(); }, &wishes_);
        show_key(std::nullopt);
    }

    void fill(const SignInForm& form) {
        server_.value(form.server.c_str());
        name_.value(form.user.c_str());
        for (auto* field : {&password_, &repeat_})
            field->value(reinterpret_cast<const char*>(form.password.data()),
                         static_cast<int>(form.password.size()));
        register_.value(form.register_account ? 1 : 0);
        (form.user.empty() ? static_cast<Fl_Input&>(name_) : password_).take_focus();
        layout();
    }
    void forget_password() {  // value() is the field's own buffer
        for (auto* field : {&password_, &repeat_}) {
            OPENSSL_cleanse(const_cast<char*>(field->value()),
                            static_cast<std::size_t>(field->size()));
            field->value("");
        }
    }

    // What the engine is doing; while it does, the form waits.
    void set_busy(const std::string& what) {
        status_.set(what);
        bool busy = !what.empty();
        activate_if(enter_, !busy);
        if (busy) clear_errors();
        layout();
    }
    enum class Field { server, name, password, repeat };
    void show_error(Field field, const std::string& sentence) {
        set_busy("");
        errors_[static_cast<std::size_t>(field)].set(sentence);
        fields()[static_cast<std::size_t>(field)]->take_focus();
        layout();
    }
    // First contact: shows the fingerprint, and asks.
    void show_key(const std::optional<chatsecure::Fingerprint>& key) {
        for (Fl_Widget* part :
             std::initializer_list<Fl_Widget*>{&key_title_, &key_, &accept_, &refuse_})
            show_if(*part, key.has_value());
        if (key) {
            status_.set("");
            key_.set(grouped(*key));
            refuse_.take_focus();
        }
        layout();
    }
    // What must not be overlooked.
    void show_warning(const std::string& text) {
        warning_.set(text);
        show_key(std::nullopt);
    }

    void submit() {
        if (enter_.active() == 0) return;
        clear_errors();
        SignInForm form{server_.value(), name_.value(), chatsecure::to_secret(password_.value()),
                        is_new()};
        Field field = Field::server;  // which is looked at, before any server hears of it
        try {
            chatsecure::parse_host_port(form.server, 5000);
            field = Field::name;
            chatsecure::fold_name(form.user);
            field = Field::password;
            if (form.password.empty()) throw chatsecure::Error("The password is missing.");
            if (is_new()) chatsecure::check_new_password(form.password);
            field = Field::repeat;
            if (is_new() && form.password != chatsecure::to_secret(repeat_.value()))
                throw chatsecure::Error("This is not what you typed above.");
        } catch (const chatsecure::Error& e) {
            return show_error(field, e.what());
        }
        wishes_.submit(form);
    }
    void draw() override {
        Fl_Double_Window::draw();
        wishes_.drawn();
    }
    int handle(int event) override {
        if (event != FL_SHORTCUT || !is_window_key() || Fl::event_key() != 'q')
            return Fl_Double_Window::handle(event);
        return wishes_.close(), 1;
    }

  private:
    bool is_new() const { return register_.value() != 0; }
    std::array<Fl_Input*, 4> fields() { return {&server_, &name_, &password_, &repeat_}; }
    // What was said of another text is not true any more. Enter goes on to what is still empty.
    void edited() {
        if (!is_enter()) return clear_errors();
        bool behind = false;
        for (Fl_Input* field : fields()) {
            if (behind && field->visible() != 0 && field->size() == 0)
                return static_cast<void>(field->take_focus());
            behind = behind || field == Fl::focus();
        }
        submit();
    }
    void clear_errors() {
        for (Text& error : errors_) error.set("");
        show_warning("");
    }
    // Each error stands below its field; the window is as high as all of it.
    void layout() {
        Column column{30, 24, 360};
        column.put(title_, 2 * gap);
        auto put_field = [&](Text& label, Fl_Input& field, Text& error) {
            field.textsize(scaled(text_size));
            column.put(label, 4);
            column.put(field, scaled(text_size) + 19, 4);
            column.put(error, 0);
            column.y += gap;
        };
        put_field(labels_[0], server_, errors_[0]);
        put_field(labels_[1], name_, errors_[1]);
        int beside = column.y;
        put_field(labels_[2], password_, errors_[2]);
        show_password_.resize(332, beside - 4, 58, 22);
        bool busy = enter_.active() == 0;
        for (auto* field : {&password_, &repeat_})
            field->input_type(show_password_.value() != 0 ? FL_NORMAL_INPUT : FL_SECRET_INPUT);
        for (Fl_Input* field : fields()) field->readonly(busy ? 1 : 0);
        show_if(repeat_, is_new());
        show_if(labels_[3], is_new());
        show_if(show_password_, !busy);
        show_if(register_, !busy);
        if (is_new()) put_field(labels_[3], repeat_, errors_[3]);
        register_.resize(column.x - check_inset, column.y + gap, 210, 30);
        enter_.copy_label(is_new() ? "Create account" : "Log in");
        enter_.resize(250, column.y + gap, 140, 34);
        column.y += 34 + 3 * gap;
        column.put(status_);
        column.put(warning_);
        column.put(key_title_);
        column.put(key_);
        accept_.resize(column.x, column.y, 175, 34);
        refuse_.resize(215, column.y, 175, 34);
        if (key_.visible() != 0) column.y += 34 + gap;
        for (Fl_Widget* check : {&show_password_, &register_})
            check->labelsize(scaled(small_size + 1));
        size(w(), std::max(column.y + gap, 400));
        redraw();
    }

    Wishes& wishes_;
    Text title_{24, ink::text, bold, "ChatSecure"};
    std::array<Text, 4> labels_{Text{small_size, ink::quiet, plain, "Server"},
                                Text{small_size, ink::quiet, plain, "Name"},
                                Text{small_size, ink::quiet, plain, "Password"},
                                Text{small_size, ink::quiet, plain, "The password once more"}};
    InputField<Fl_Input> server_{"server"}, name_{"name"};
    InputField<Fl_Secret_Input> password_{"password"};
    InputField<Fl_Secret_Input> repeat_{"repeat"};
    std::array<Text, 4> errors_{Text{small_size, ink::warning}, Text{small_size, ink::warning},
                                Text{small_size, ink::warning}, Text{small_size, ink::warning}};
    Fl_Check_Button register_{0, 0, 0, 0, "This is a new account"};
    Button enter_{"Log in", [this] { submit(); }, true};
    Fl_Check_Button show_password_{0, 0, 0, 0, "Show"};  // not between the fields, for Tab
    Text status_{small_size, ink::quiet};
    Text warning_{small_size, ink::warning, bold, "", ink::alarm};
    Text key_title_{small_size + 1, ink::text, plain,
                    "This server is not known yet. Compare its fingerprint with the one that its "
                    "operator gave you:"};
    Text key_{small_size + 1, ink::text, fixed_pitch};
    Button accept_{"It is the same", [this] { wishes_.answer_key(true); }};
    Button refuse_{"Do not connect", [this] { wishes_.answer_key(false); }, true};
};

// ---- Who somebody is, on the right --------------------------------------------------------------

// What is to be compared before it is trusted, whole: it scrolls if the window is small. The button
// at its end wants the tick, so nobody trusts or verifies by pressing what comes first.
class Details : public Fl_Scroll {
  public:
    struct Content {
        std::string title{}, story{}, number{}, prints{};
        const char* act = nullptr;     // what a comparison allows,
        bool compares = true;          // or what takes it back
        const char* ignore = nullptr;  // or the other way round
        friend bool operator==(const Content&, const Content&) = default;
    };
    explicit Details(Wishes& wishes) : Fl_Scroll(0, 0, 0, 0), wishes_(wishes) {
        end();
        type(Fl_Scroll::VERTICAL);
        box(FL_FLAT_BOX);
        color(ink::panel);
        scrollbar.color(ink::window);
        compared_.callback(call<Details, &Details::ticked>, this);
    }
    // Whoever has ticked "I compared" has compared what was shown then: anything else takes the
    // tick away.
    void set(const Content& content) {
        if (content != std::exchange(content_, content)) compared_.value(0);
        title_.set(content.title);
        story_.set(content.story);
        number_.set(content.number);
        prints_.set(content.prints);
        show_if(compared_, content.act != nullptr && content.compares);
        show_if(act_, content.act != nullptr);
        show_if(ignore_, content.ignore != nullptr);
        act_.copy_label(content.act);
        ignore_.copy_label(content.ignore);
        ticked();
        resize(x(), y(), w(), h());
    }
    // To where another Enter does no harm.
    void take_harmless_focus() { close_.take_focus(); }
    void resize(int nx, int ny, int nw, int nh) override {
        Fl_Widget::resize(nx, ny, nw, nh);
        scroll_to(0, 0);
        Column column{nx + margin, ny + gap, std::max(nw - 2 * margin, 10)};
        close_.resize(nx + nw - 30 - margin, ny + gap, 30, 30);
        column.w -= 30;
        column.y += 4;
        column.put(title_, gap + 2);
        column.w += 30;
        column.put(story_);
        column.put(number_);
        column.put(prints_);
        compared_.labelsize(scaled(small_size + 1));
        column.put(compared_, scaled(22), 4);
        compared_.position(column.x - check_inset, compared_.y());
        column.put(act_, scaled(text_size) + 16);
        column.put(ignore_, scaled(text_size) + 16);
        redraw();
    }

  private:
    Content content_;
    void ticked() { activate_if(act_, compared_.value() != 0 || !content_.compares); }

    Wishes& wishes_;
    Text title_{text_size, ink::text, bold};
    Text story_{small_size, ink::text};
    Text number_{number_size, ink::text, fixed_pitch, "", ink::field};
    Text prints_{small_size - 1, ink::text, fixed_pitch};
    Fl_Check_Button compared_{0, 0, 0, 0, "I compared all of it: it is the same"};
    Button act_{"", [this] { wishes_.settle(); }};
    Button ignore_{"", [this] { wishes_.toggle_ignored(); }};
    Button close_{"\u2715", [this] { wishes_.toggle_details(); }};
};

// ---- The main window ----------------------------------------------------------------------------

class MainWindow : public Fl_Double_Window {
  public:
    MainWindow(Model& model, Wishes& wishes)
        : Fl_Double_Window(960, 640, "ChatSecure"), model_(model), wishes_(wishes) {
        end();
        color(ink::window);
        resizable(nullptr);
        size_range(480, 360);
        callback([](Fl_Widget*, void* w) { static_cast<Wishes*>(w)->close(); }, &wishes_);
        input.callback(call<MainWindow, &MainWindow::layout>, this);
        details.hide();
        side_.box(FL_FLAT_BOX);
        side_.color(ink::panel);
        layout();
    }

    void set_state(const std::string& text, Fl_Color colour) {
        state_ = text;
        state_colour_ = colour;
        redraw();
    }
    void end_input() {
        input.readonly(1);  // not deactivated: FLTK would make its text pale
        send_.deactivate();
        send_file_.deactivate();
    }
    // A sentence above the conversation that must not be overlooked; empty: none. It stays as long
    // as what it says is true.
    void set_banner(const std::string& text) {
        if (text == banner_.label()) return;
        banner_.set(text);
        layout();
    }
    void pop_up_at_file(const std::vector<MenuLine>& lines) {
        pop_up(lines, send_file_.x(), send_file_.y() + send_file_.h());
    }
    bool has_details() const { return details.visible() != 0; }
    void show_details(bool show) {
        bool inside = details.contains(Fl::focus()) != 0;
        show_if(details, show);
        layout();
        if (!show && (inside || Fl::focus() == nullptr)) input.take_focus();
    }

    void resize(int nx, int ny, int nw, int nh) override {
        Fl_Double_Window::resize(nx, ny, nw, nh);
        layout();
    }
    void draw() override {
        Fl_Double_Window::draw();
        fl_color(ink::line);
        fl_line(list_width(), 0, list_width(), h());
        if (details.visible() != 0) fl_line(details.x(), 0, details.x(), h());
        if (view.visible() != 0) {
            int left = list_width() + margin, room = send_file_.x() - gap - left;
            fl_line(list_width(), head() - 1, list_width() + middle(), head() - 1);
            use_font(title_size, bold);
            fl_color(ink::text);
            draw_text(model_.shown().title(), left, scaled(title_size) + 7, room);
            use_font(small_size);
            fl_color(model_.shown().is_trusted() ? ink::quiet : ink::warning);
            draw_text(model_.subtitle(), left, scaled(title_size + small_size) + 13, room);
        }
        draw_disc(std::min(margin, menu_.x() - 12), h() - 28, 8, state_colour_);
        use_font(small_size);
        fl_color(state_colour_);
        if (int room = menu_.x() - 32; room > 30)
            draw_text(state_, 32, h() - 24 + scaled(small_size) / 3, room);
        wishes_.drawn();
    }
    int handle(int event) override {
        if ((event == FL_SHORTCUT || event == FL_KEYBOARD) && key(event)) return 1;
        if (event == FL_PUSH && banner_.visible() != 0 && Fl::event_inside(&banner_) != 0 &&
            !has_details())
            return wishes_.toggle_details(), 1;  // where what it says can be mended
        return Fl_Double_Window::handle(event);
    }

    void layout() {
        side_.resize(0, 0, list_width(), h());
        list.resize(0, 0, list_width(), h() - 46);
        menu_.resize(list_width() - 38, h() - 39, 30, 30);
        // A narrow window shows either the conversation or the details.
        bool conversation = middle() > 0;
        for (Fl_Widget* part : std::initializer_list<Fl_Widget*>{&view, &input, &send_, &send_file_,
                                                                 &details_button_})
            show_if(*part, conversation);
        int left = list_width() + margin, right = list_width() + middle() - margin;
        int wide = details_button_.wanted_width();
        details_button_.resize(right - wide, gap + 2, wide, head() - 2 * gap - 4);
        wide = send_file_.wanted_width();
        send_file_.resize(details_button_.x() - gap - wide, gap + 2, wide, head() - 2 * gap - 4);

        int top = head();
        show_if(banner_, conversation && !banner_.is_empty());
        int high = banner_.visible() == 0
                       ? 0
                       : std::min(banner_.wanted_height(right - left), h() / 2 - 2 * gap);
        banner_.resize(left, top + gap, right - left, high);
        if (high > 0) top += high + gap;
        input.textsize(scaled(text_size));
        int send_width = send_.wanted_width();
        input.resize(left, 0, right - left - send_width - gap, 10);
        high = std::min(input.wanted_height(), h() / 3);
        input.resize(left, h() - high - gap, input.w(), high);
        send_.resize(right - send_width, input.y(), send_width, high);
        view.resize(list_width(), top, middle(), input.y() - gap - top);
        details.resize(list_width() + middle(), 0, w() - list_width() - middle(), h());
        init_sizes();
        redraw();
    }

  private:
    static bool is_text() {
        return Fl::event_length() > 0 && static_cast<unsigned char>(Fl::event_text()[0]) >= ' ' &&
               (Fl::event_state() & (FL_CTRL | FL_ALT | FL_META)) == 0;
    }
    // The keys that mean the same wherever the focus stands.
    bool key(int event) {
        int key = Fl::event_key();
        if (Fl::modal() != nullptr) return false;  // a question is before us: it is its key
        if (is_window_key()) {
            if (key == FL_Page_Up) list.step(-1);
            if (key == FL_Page_Down) list.step(1);
            if (key == 'o') wishes_.send_file();
            if (key == 'd') wishes_.toggle_details();
            if (key == 'd' && has_details()) details.take_harmless_focus();
            if (key == '+' || key == '=' || key == FL_KP + '+') wishes_.zoom(1);
            if (key == '-' || key == FL_KP + '-') wishes_.zoom(-1);
            if (key == '0') wishes_.zoom(0);
            if (key == 'q') wishes_.close();
            return true;
        }
        if (key == FL_Escape) {  // never closes the window
            if (has_details()) wishes_.toggle_details();
            return input.take_focus(), true;
        }
        if (event == FL_KEYBOARD && is_text() && input.readonly() == 0 && input.visible() != 0)
            return input.take_focus(), input.handle(event) != 0;  // nobody else wanted it
        return false;
    }

    int list_width() const {  // room for the faces only, in a narrow window
        return w() < 640 ? scaled(34) + 3 * gap : scaled(200);
    }
    int middle() const {  // of the conversation: 0 if the details take its place
        int all = w() - list_width();
        if (!has_details()) return all;
        return all - scaled(details_width) < 280 ? 0 : all - scaled(details_width);
    }
    int head() const { return scaled(title_size + small_size) + 22; }
    Model& model_;
    Wishes& wishes_;
    Fl_Box side_{0, 0, 0, 0};

  public:  // in the order of Tab
    PeopleList list{model_, wishes_};
    ConversationView view{model_, wishes_};
    MessageInput input{model_, wishes_, view};

  private:
    Button send_{"Send", [this] { input.send(); }, true};
    Button menu_{"\u2261", [this] { pop_up(wishes_.menu(), menu_.x(), menu_.y(), true); }};
    Button send_file_{"File\u2026", [this] { wishes_.send_file(); }};
    Button details_button_{"Details", [this] { wishes_.toggle_details(); }};
    Text banner_{small_size, ink::warning, bold, "", ink::alarm};
    std::string state_;
    Fl_Color state_colour_ = ink::quiet;

  public:
    Details details{wishes_};
};

// ---- What is kept, what is known, what tests see ------------------------------------------------

// What is remembered from one time to the next: words and their values, among them those of other
// versions. Everything but the password.
using Settings = std::map<std::string, std::string>;

Settings load_settings(const std::filesystem::path& file) {
    Settings settings{{"server", "localhost:5000"}};
    try {
        chatsecure::read_lines(file, 65536, "", [&](std::vector<std::string> words) {
            if (std::size_t at = words[0].find('='); at != std::string::npos)  // as it once was
                words = {words[0].substr(0, at), words[0].substr(at + 1)};
            if (words.size() == 2) settings[words[0]] = words[1];
        });
    } catch (const chatsecure::Error&) {  // comfort only: it begins as it would the first time
    }
    return settings;
}
void save_settings(const std::filesystem::path& file, const Settings& settings) {
    try {
        std::string text;
        for (const auto& [word, value] : settings) text += concat(word, " ", value, "\n");
        chatsecure::make_private_directory(file.parent_path());
        chatsecure::write_file(file, chatsecure::as_bytes(text), chatsecure::FileMode::owner_only);
    } catch (const chatsecure::Error& e) {
        std::cerr << "gui_client_fltk: " << e.what() << std::endl;
    }
}

// What Details says of who somebody is.
Details::Content describe(const Conversation& c) {
    if (c.name.empty())
        return {"Everyone",
                "Messages are sealed for those who are online; the server cannot read them.\n \n"
                "Choose a person on the left to see their identity."};
    Details::Content content{c.name};
    bool known = c.knows_number() && c.standing != Standing::refused;
    content.story = c.standing == Standing::refused
                        ? "What was shown as their key card is none. Nothing can be sealed for "
                          "them, nor is anything of them opened; another login may be better."
                    : known ? "Compare all of the safety number, by telephone or face to face. If "
                              "yours is another one, somebody reads along: do not trust it."
                    : c.online
                        ? "Asking for the safety number \u2026"
                        : concat(c.name, " is offline: the safety number is there when they are.");
    if (known) content.number = chatsecure::safety_number_rows(c.number->digits);
    if (c.changed) {
        content.story = "This is not the identity that you know. " + content.story;
        content.prints =
            concat("Known:\n", grouped(c.changed->pinned), "\nNow:\n", grouped(c.changed->seen));
        content.act = known ? "Trust the new identity" : nullptr;
    } else if (known) {
        if (!c.is_trusted()) content.story = "This is an old key card. " + content.story;
        if (c.verified) content.story = "\u2713 You have compared the number.";
        content.prints = concat("Identity:\n", grouped(c.number->theirs));
        content.act = !c.is_trusted() ? "Trust it all the same"
                      : c.verified    ? "Not verified after all"
                                      : "Mark as verified";
        content.compares = !c.verified;
    }
    content.ignore = c.ignored ? "Ignore no longer" : "Ignore them";
    return content;
}

// For tests: what the window shows, as lines, and where to click.
class Reports {
  public:
    explicit Reports(bool wanted) : wanted_(wanted) {
        if (!wanted) return;
        Fl::add_timeout(tick_seconds, tick, this);
        for (std::size_t t : {0U, 1U}) {
            auto writing = [&](unsigned letters, unsigned ground) {
                line(concat("writing ", letters, " on ", ground));
            };
            auto pair = [&](Fl_Color letters, Fl_Color ground) {
                writing(theme[t][letters - ink::window], theme[t][ground - ink::window]);
            };
            for (Fl_Color letters : ink::letters)
                for (Fl_Color ground : ink::grounds) pair(letters, ground);
            for (auto [letters, ground] : ink::other_pairs) pair(letters, ground);
            for (unsigned person : colours_of_people[t])  // names, and letters on faces and sheets
                writing(person, theme[t][0]), writing(person, theme[t][1]);
        }
    }
    void line(const std::string& line) const {
        if (wanted_) std::cout << line << std::endl;
    }
    // When what is about to open waits for keys.
    void line_soon(const std::string& line) {
        soon_ = line;
        auto say = [](void* self) {
            static_cast<Reports*>(self)->line(static_cast<Reports*>(self)->soon_);
        };
        Fl::add_timeout(0, say, this);
    }
    // Whenever that has changed.
    void places(const Fl_Group& window, const ConversationView& view, const PeopleList& list) {
        if (!wanted_) return;
        std::string places = places_in(window);
        for (const auto& [name, place] : view.places())
            places += line_of(name, place.x, place.y, place.w, place.h);
        int at = list.y() + gap, high = PeopleList::row_height();
        for (const Conversation* c : list.rows()) {
            places += line_of("row-" + c->title(), list.x(), at, list.w(), high);
            at += high;
        }
        if (places == places_) return;
        places_ = places;
        std::cout << places << std::flush;
    }

  private:
    static std::string line_of(const std::string& name, int x, int y, int w, int h) {
        return concat("place ", name, " ", x + w / 2, " ", y + h / 2, "\n");
    }
    // All that has a label, by its label.
    static std::string places_in(const Fl_Group& group) {
        std::string places;
        for (int i = 0; i < group.children(); ++i) {
            Fl_Widget& child = *group.child(i);
            if (child.visible_r() == 0 || child.h() == 0) continue;
            if (child.label() != nullptr && *child.label() != '\0')
                places +=
                    line_of(visible(child.label()), child.x(), child.y(), child.w(), child.h());
            if (child.as_group() != nullptr) places += places_in(*child.as_group());
        }
        return places;
    }
    // How late the window's own timer is, at worst: how long it ever did not listen.
    static constexpr double tick_seconds = 0.02;
    static void tick(void* data) {
        auto* self = static_cast<Reports*>(data);
        auto now = chatsecure::Clock::now();
        std::int64_t late = (now - self->last_tick_) / chatsecure::Milliseconds(1) - 20;
        if (self->last_tick_ != chatsecure::Clock::time_point{} && late > self->slowest_ms_)
            self->line(concat("slowest ", self->slowest_ms_ = late, " ms"));
        self->last_tick_ = now;
        Fl::repeat_timeout(tick_seconds, &Reports::tick, data);
    }
    bool wanted_;
    std::string places_, soon_;
    std::int64_t slowest_ms_ = -1;
    chatsecure::Clock::time_point last_tick_;
};

// Asks the desktop to mark the window in the taskbar, or no longer to.
void ask_for_attention([[maybe_unused]] Fl_Window& window, [[maybe_unused]] bool yes) {
#ifdef CHATSECURE_X11
    if (fl_display == nullptr || window.shown() == 0) return;
    XWMHints* hints = XGetWMHints(fl_display, fl_xid(&window));
    if (hints == nullptr) hints = XAllocWMHints();
    hints->flags = yes ? hints->flags | XUrgencyHint : hints->flags & ~XUrgencyHint;
    XSetWMHints(fl_display, fl_xid(&window), hints);
    XFree(hints);
#endif
}

// ---- Between the windows and the engine ---------------------------------------------------------

struct Flags {
    SignInForm form;
    bool report = false;
    chatsecure::ClientOptions options{};  // as far as flags tell
};

class App final : Wishes {
  public:
    explicit App(Flags flags) : flags_(std::move(flags)) {
        auto zoom = chatsecure::parse_number<std::uint16_t>(settings_["zoom"]).value_or(100);
        style = {settings_["dark"] == "1", std::clamp<int>(zoom, smallest_zoom, largest_zoom)};
        set_theme();
        SignInForm form = flags_.form;
        if (form.server.empty()) form.server = settings_["server"];
        if (form.user.empty()) form.user = settings_["user"];
        sign_in_.fill(form);
        sign_in_.show();
        Fl::add_check(&App::mark_read, this);
        reports_.line(concat("downloads ", flags_.options.files.downloads.string()));
        if (!flags_.form.user.empty() && !flags_.form.password.empty()) sign_in_.submit();
    }

    int run() {
        while (!quit_) Fl::wait(1000);
        client_.reset();
        if (Fl::has_timeout(&App::save, this) != 0) save(this);
        return 0;
    }

  private:
    // ---- Signing in -----------------------------------------------------------------------------

    void submit(const SignInForm& form) override {
        chatsecure::HostPort server = chatsecure::parse_host_port(form.server, 5000);
        chatsecure::ClientOptions options = flags_.options;
        options.host = server.host;
        options.port = server.port;
        options.user = chatsecure::fold_name(form.user);
        options.password = form.password;
        options.register_account = registering_ = form.register_account;
        options.ask_about_server = true;
        options.on_event = [this] {
            if (!woken_.exchange(true)) Fl::awake(&App::take_events_soon, this);
        };
        settings_["server"] = form.server;
        settings_["user"] = options.user;
        settings_changed();
        sign_in_.set_busy("Connecting \u2026");
        client_.reset();
        client_ = std::make_unique<chatsecure::Client>(std::move(options));
    }

    void answer_key(bool accept) override {
        sign_in_.show_key(std::nullopt);
        sign_in_.set_busy("Connecting \u2026");
        client_->try_post(chatsecure::AcceptServerKey{accept});
    }

    void sign_in_failed(const chatsecure::Stopped& stopped) {
        using enum chatsecure::StopReason;
        std::string sentence = visible_lines(stopped.sentence);
        reports_.line(concat("sign-in-error ", visible(stopped.sentence)));
        sign_in_.set_busy("");
        if (stopped.reason == cannot_connect || stopped.reason == server_key_unknown)
            sign_in_.show_error(SignIn::Field::server, sentence);
        else if (stopped.reason == login_refused)
            sign_in_.show_error(
                registering_ ? SignIn::Field::name : SignIn::Field::password,
                sentence + (registering_ ? "" : " Is this a new account? Then say so below."));
        else
            sign_in_.show_warning(sentence);
    }

    // ---- Events: in this thread, some at a time -------------------------------------------------

    // A handler of Fl::awake must send the window no message, and in Windows a new title is one:
    // FLTK would hand on that message again, when what it points to is gone. A timer may.
    static void take_events_soon(void* data) { Fl::add_timeout(0, &App::take_events, data); }
    static void take_events(void* data) {
        auto* self = static_cast<App*>(data);
        self->woken_ = false;
        self->model_.forget_strangers();
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

    void on(const chatsecure::Connecting&) { set_state("connecting", ink::quiet); }
    void on(const chatsecure::ServerKeyUnknown& e) {
        sign_in_.show_key(e.fingerprint);
        reports_.line(concat("asks-about-key ", e.fingerprint.text()));
    }
    void on(const chatsecure::MakingIdentity&) { sign_in_.set_busy("Making your key \u2026"); }
    void on(const chatsecure::LoggedIn& e) {
        for (const std::string& user : e.others) model_.person(user).online = true;
        model_.connected = true;
        no_connection_.clear();
        set_state(concat("online as ", e.user), ink::online);
        if (e.again) return note("", "Connected again.");
        flags_.form.password = {};  // wiped, as the field's
        sign_in_.forget_password();
        sign_in_.hide();
        main_.show();
        choose("");
        main_.input.take_focus();
        note(concat("You are ", e.user, " at ", visible(e.server),
                    ". Everything written here is read by everyone who is online, and by nobody "
                    "else; nothing of it is kept when you leave. To write to one person, choose "
                    "them on the left."));
    }
    void on(const chatsecure::ConnectionLost& e) {
        if (model_.connected) note("", "The connection is lost.");  // not at each attempt
        model_.all_offline();
        no_connection_ = concat("There is no connection. ", visible(e.reason),
                                " What you write is sent when it is back.");
        show_waiting();
    }
    void on(const chatsecure::PersonJoined& e) {
        Conversation& c = model_.person(e.user);
        c.number_asked = false;
        c.changed.reset();
        c.number.reset();
        come_or_go(e.user, true);
    }
    void on(const chatsecure::PersonLeft& e) { come_or_go(e.user, false); }
    // Told where one may be writing to them, too.
    void come_or_go(const std::string& user, bool here) {
        Conversation& c = model_.person(user);
        c.online = here;
        std::string what = concat(user, here ? " joined" : " left");
        note("", what);
        if (!c.entries.empty()) note(user, what);
    }
    void on(const chatsecure::RoomMessage& e) {
        add("", {.from = e.from,
                 .text = visible_lines(e.text),
                 .own = e.own,
                 .mentions_us = !e.own && chatsecure::mentions(e.text, client_->user()),
                 .id = e.own ? e.id : 0});
    }
    void on(const chatsecure::PrivateMessage& e) {
        reply_to_ = e.peer;
        bool is_new = e.own && model_.find(e.peer) == nullptr;
        add(e.peer, {.from = e.own ? client_->user() : e.peer,
                     .text = visible_lines(e.text),
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
        Conversation* c = model_.find(e.to);
        std::string text = c == nullptr ? "" : c->mark(e);
        reports_.line(concat("mark ", chatsecure::delivery_mark(e.state), " ", visible(e.text)));
        if (!model_.connected && !over_) show_waiting();
        if (e.state != failed) return;
        if (quitting_ && !quiet_loss_) ++lost_;
        warn(c == nullptr ? model_.current : e.to,  // perhaps a slip: nobody is called so
             concat(e.to.empty() ? "Not sent to everyone: "
                                 : concat("Not delivered to ", e.to, ", who "),
                    visible(e.reason), ": ", visible_lines(e.text)));
        if (c != nullptr && !c->is_trusted()) give_back(*c, text);
    }
    // Where it belongs, and no louder: others could fill the list with alarms.
    void on(const chatsecure::Complaint& e) {
        note(model_.find(e.user) != nullptr ? e.user : "", visible(e.text));
    }
    void on(const chatsecure::IdentityReplaced& e) {
        warn("",
             concat("YOUR IDENTITY IS A NEW ONE: this account had another one before. Everybody "
                    "who knew the old one is warned, and reads and sends you nothing until they "
                    "trust the new one. Tell them its fingerprint by telephone: ",
                    e.now.text()));
    }
    void on(const chatsecure::IdentityPinned& e) {
        model_.person(e.user).number_asked = false;
        note(e.user, concat("First contact with ", e.user, ". To be certain that it is ", e.user,
                            ", compare the safety number: Details."));
    }
    void on(const chatsecure::IdentityChanged& e) {
        Conversation& c = model_.person(e.user);
        c.changed = e;
        c.number.reset();  // it was another one's
        c.number_asked = false;
        warn(e.user,
             concat("THE IDENTITY OF ", e.user, " HAS CHANGED. Nothing is sent to or shown from ",
                    e.user, " until you trust the new one: Details."));
    }
    void on(const chatsecure::SafetyNumber& e) {
        Conversation& c = model_.person(e.user);
        c.number = e;
        if (e.verified != c.verified)
            note(e.user,
                 concat(e.user, e.verified ? " is verified." : " is not verified any more."));
        set_verified(c, e.verified);
        reports_.line(concat("safety-number ", e.user, " ", e.digits));
        if (e.user == std::exchange(verifying_, "")) {  // a line asked for it
            choose(e.user);
            main_.show_details(true);
        }
        show_details();
    }
    void on(const chatsecure::People& e) {
        std::vector<std::string> names;
        for (const chatsecure::Person& p : e.people)
            names.push_back(p.user + (p.self ? " (you)" : ""));
        note(concat("Online: ", chatsecure::listed(names)));
    }
    // Comes behind PersonJoined, IdentityPinned and IdentityChanged, too.
    void on(const chatsecure::PersonChanged& e) {
        Conversation& c = model_.person(e.now.user);
        c.ignored = e.now.ignored;
        // That an identity has changed is true for the next login, too, until its card is here.
        if (e.now.standing != Standing::unknown || !c.changed) c.standing = e.now.standing;
        if (c.is_trusted() && c.changed) {
            if (!c.knows_number()) c.number.reset(), c.number_asked = false;
            c.changed.reset();
        }
        set_verified(c, e.now.verified && c.is_trusted());
        if (c.name == model_.current) show_details();
    }
    void on(const chatsecure::Notice& e) { note(visible(e.text)); }
    void on(const chatsecure::Problem& e) {
        verifying_.clear();
        warn(model_.current, visible(e.text));
    }

    void on(const chatsecure::FileEvent& e) {
        using enum chatsecure::FileEvent::Phase;
        bool is_new = model_.card(e.file.number) == nullptr;
        model_.set_card(e);
        if (is_new)
            add(e.file.user, {.kind = Entry::Kind::file,
                              .from = e.file.sending ? client_->user() : e.file.user,
                              .own = e.file.sending,
                              .file = e.file.number});
        bool ends = e.phase == interrupted || e.phase == stopped;
        if (ends) reports_.line(concat("file-stopped ", visible(e.sentence)));
        if (e.phase == started || e.phase == finished)
            reports_.line(concat(e.phase == started ? "file-moving" : "file-done",
                                 e.file.sending ? " to " : " from ", e.file.user, " ",
                                 visible(e.file.name)));
    }
    void on(const chatsecure::FileList& e) {
        if (e.files.empty()) note("No files are offered or on their way.");
        for (const chatsecure::FileStatus& f : e.files)
            note(concat("File ", f.file.number, ": ", visible(f.file.name),
                        f.file.sending ? " to " : " from ", f.file.user));
    }
    void on(const chatsecure::Stopped& e) {
        if (quitting_ && lost_ == 0) {
            quit_ = true;
        } else if (main_.shown() == 0) {
            sign_in_failed(e);
        } else {
            reports_.line(concat("stopped ", visible(e.sentence)));
            model_.all_offline();
            over_ = true;
            set_state("disconnected", ink::warning);
            no_connection_ =
                lost_ == 0 ? visible_lines(e.sentence)
                           : concat(lost_, lost_ == 1 ? " message was" : " messages were",
                                    " not delivered: see the marks. Close the window once more.");
            main_.end_input();
        }
    }

    // ---- The model changes ----------------------------------------------------------------------

    void set_verified(Conversation& c, bool verified) {
        if (verified && !c.verified) reports_.line(concat("verified ", c.name));
        c.verified = verified;
    }
    void add(const std::string& where, Entry entry) {
        Conversation& c = model_.person(where);
        entry.time = time_;
        bool from_others = entry.is_said() && !entry.own;
        bool news = from_others || entry.kind == Entry::Kind::warning;
        const Entry& added = c.add(std::move(entry));
        if (where == model_.current) main_.view.update(added.own);
        bool seen = where == model_.current && is_reading();
        bool for_us = from_others && (!where.empty() || added.mentions_us);
        if (news && !seen) ++c.unread;
        if (from_others && !seen && settings_["sound"] == "1") fl_beep(FL_BEEP_MESSAGE);
        if (for_us && !seen) {
            ask_for_attention(main_, true);
            reports_.line(concat("attention ", c.title()));
        }
        if (added.new_day) reports_.line(concat("day ", c.title(), " | ", day_text(added.time)));
        const FileEvent* card = model_.card(added.file);
        reports_.line(card != nullptr
                          ? concat("card ", added.file, " ", visible(card->file.name))
                          : concat("shown ", c.title(), " | ", added.is_said() ? added.from : "*",
                                   ": ", visible(added.text)));
    }
    // Whether the end of the current conversation is before somebody's eyes. No widget has the
    // focus while another program has the keyboard.
    bool is_reading() { return main_.view.is_at_end() && Fl::focus() != nullptr; }
    // FLTK calls it whenever something has happened.
    static void mark_read(void* data) {
        auto* self = static_cast<App*>(data);
        unsigned& unread = self->model_.conversations.at(self->model_.current).unread;
        if (unread == 0 || self->main_.shown() == 0 || !self->is_reading()) return;
        unread = 0;
        self->refresh();
    }
    void warn(const std::string& where, const std::string& text) {
        add(where, {.kind = Entry::Kind::warning, .text = text});
    }
    // A line of our own, where the user looks or elsewhere.
    void note(const std::string& text) { note(model_.current, text); }
    void note(const std::string& where, const std::string& text) {
        add(where, {.kind = Entry::Kind::system, .text = text});
    }
    // What somebody must not read yet is not lost for that.
    void give_back(Conversation& c, const std::string& text) {
        if (c.name == model_.current && main_.input.size() == 0)
            main_.input.put(text);
        else if (c.name != model_.current && c.draft.empty())
            c.draft = text;
    }

    void set_state(const std::string& text, Fl_Color colour) {
        main_.set_state(text, colour);
        reports_.line(concat("state ", text));
    }
    void show_waiting() {
        std::size_t waiting = client_->waiting();
        set_state(
            waiting == 0 ? std::string("reconnecting") : concat("offline, ", waiting, " to send"),
            ink::warning);
    }
    // After some events: what depends on all of them is set and drawn once.
    void refresh() {
        unsigned unread = model_.unread();
        std::string title = concat(unread > 0 ? concat("(", unread, ") ") : "", client_->user(),
                                   " \u2013 ChatSecure");
        if (title != title_) main_.copy_label(title.c_str());
        title_ = title;
        if (unread == 0) ask_for_attention(main_, false);
        main_.set_banner(banner());
        main_.redraw();
    }

    std::string banner() const {
        const Conversation& c = model_.shown();
        if (!no_connection_.empty()) return no_connection_;
        if (std::vector<std::string> out = model_.left_out(); c.name.empty() && !out.empty())
            return concat(
                "Not read by ", chatsecure::listed(out),
                ", nor is shown what they write: the identity that they have shown is not "
                "trusted. Choose them on the left.");
        if (!c.is_trusted())
            return concat(c.name, " ", c.doubt(), ". Nothing is sent to or shown from ", c.name,
                          c.standing == Standing::changed ? " until you trust it: Details." : ".");
        return c.ignored ? concat("You ignore ", c.name,
                                  ". What they write and offer is hidden: Details.")
                         : "";
    }

    // ---- What the user does ---------------------------------------------------------------------

    // False, with a sentence in the conversation, if the engine does not take it.
    bool post(chatsecure::Command command) {
        if (client_->try_post(std::move(command))) {
            if (!model_.connected) show_waiting();
            return true;
        }
        warn(model_.current, over_ ? "You are not connected any more: this was not done."
                                   : "Too much waits to be sent already: this was not done.");
        refresh();
        return false;
    }

    // Each conversation has its own half-typed line, so none goes to the wrong one.
    void choose(const std::string& name) override {
        MessageInput& input = main_.input;
        model_.person(model_.current).draft = input.value();
        model_.current = name;
        Conversation& c = model_.person(name);
        c.unread = 0;
        if (c.entries.empty() && !name.empty())
            note(name,
                 concat("What you write is read by ", name, " alone. File\u2026 offers a file. ",
                        "Details tells whether it is really ", name, "."));
        input.put(std::exchange(c.draft, ""));
        main_.view.show_conversation(&c);
        show_details();
        refresh();
        reports_.line(concat("chosen ", c.title()));
    }

    // In Everyone with the name in front.
    void reply(const std::string& user) override {
        if (model_.current.empty()) main_.input.put(concat(user, ": ", main_.input.value()));
        main_.input.take_focus();
    }
    // What was written, or a command. False if nothing came of it: then the line can be corrected.
    bool send_line(const std::string& line) override {
        using namespace chatsecure;
        try {
            if (!command_of(line).empty()) main_.view.update(true);  // to where its answer will be
            if (!help_asked(line).empty()) return show_help(), true;
            if (is_command(line, "/quit")) return close(), true;
            std::optional<Command> command = parse_command(line, reply_to_);
            if (!command) return true;
            if (auto* say = std::get_if<Say>(&*command); say && !model_.current.empty())
                command = Tell{model_.current, std::move(say->text)};
            if (const auto* tell = std::get_if<Tell>(&*command)) {
                const Conversation* to = model_.find(tell->user);
                if (to != nullptr && tell->user != model_.current) choose(tell->user);
                if (to != nullptr && !to->is_trusted()) return blocked(*to), false;
            }
            if (const auto* verify = std::get_if<Verify>(&*command)) verifying_ = verify->user;
            return post(std::move(*command));
        } catch (const Error& e) {
            warn(model_.current, visible(e.what()));
            refresh();
            return false;
        }
    }
    // What was written stays in the input, and what has to be done first is shown.
    void blocked(const Conversation& c) {
        reports_.line(concat("blocked ", c.name));
        warn(c.name, concat("Nothing goes to ", c.name, ", who ", c.doubt(),
                            ". Details says how to go on."));
        main_.show_details(true);
        show_details();
        refresh();
    }
    void show_help() {
        std::string text = "Commands:";
        for (const auto& help : chatsecure::command_help) {
            bool to_one = help.usage == "TEXT" && !model_.current.empty();
            text += concat("\n", help.usage, ": ",
                           to_one ? concat("to ", model_.current, " alone") : help.meaning);
        }
        note(concat(text,
                    "\n \nKeys:\nEnter: send; with Shift: a new line\nUp: what you wrote before\n"
                    "Tab: completes a name, a command, a path; or moves on\n"
                    "Ctrl-PageUp, Ctrl-PageDown: the conversation before, the next\n"
                    "Ctrl-O: offer a file\nCtrl-D: details\nCtrl-Q: quit\n"
                    "Ctrl +, Ctrl \u2212, Ctrl 0: larger, smaller, usual letters\n"
                    "PageUp, PageDown: read back\n"
                    "Left, Right, Enter, in the conversation: its buttons and links\n"
                    "Menu: what else can be done\n \n"
                    "Marks:\n\u2026 it waits\n\u2713 it is on its way\n"
                    "\u2713\u2713 it was shown to its reader\n! it was not delivered\n"
                    "In the list: \u2713 verified, ! another identity than before, crossed out: "
                    "ignored"));
        refresh();
    }

    // A button on the card of a file.
    void press(Action action, unsigned number) override {
        const FileEvent* card = model_.card(number);
        if (card == nullptr) return;
        if (action == Action::save) post(chatsecure::AcceptFile{number, ""});
        if (action == Action::decline) post(chatsecure::DeclineFile{number});
        if (action == Action::cancel) post(chatsecure::CancelFile{number});
        std::filesystem::path folder = card->path.parent_path();
        if (action == Action::open) open(chatsecure::file_address(card->path), card->path.string());
        if (action == Action::open_folder) open(chatsecure::file_address(folder), folder.string());
    }
    // With the program that the desktop has for it.
    void open(const std::string& address, const std::string& name) {
        reports_.line(concat("opens ", address));
        std::array<char, 512> problem{};
        if (fl_open_uri(address.c_str(), problem.data(), static_cast<int>(problem.size())) == 0)
            warn(model_.current,
                 concat("Cannot open ", visible(name), ": ", visible(problem.data())));
        else  // and what became of that, nobody tells us
            note(concat("The desktop was asked to open ", visible(name)));
        refresh();
    }
    // Whoever sends a link chooses where it leads; whoever clicks sees that first, all of it.
    void open_link(const std::string& address) override {
        if (address.size() > 400)
            return warn(model_.current, "This address is too long to be shown whole: not opened.");
        reports_.line_soon(concat("asks-about-link ", address));
        if (!ask(main_, concat("Open this in your browser?\n", address), "Open", "Cancel"))
            return reports_.line("stays");
        open(address, address);
    }

    void offer(const std::string& to, const std::filesystem::path& path) {
        if (to.empty())
            warn("", "Files go to one person: choose one on the left.");
        else
            post(chatsecure::SendFile{to, {path}});
        refresh();
    }
    void send_file() override {
        if (model_.current.empty()) {  // to whom?
            std::vector<MenuLine> people;
            for (const std::string& name : model_.online())
                people.push_back({"For " + name, [this, name] {
                                      choose(name);
                                      send_file();
                                  }});
            if (people.empty()) return note("Nobody else is online to take a file."), refresh();
            reports_.line_soon("asks-to-whom");
            return main_.pop_up_at_file(people);
        }
        const Conversation& c = model_.shown();
        const std::string to = c.name;  // also if another one is chosen in the meantime
        if (!c.is_trusted()) return blocked(c);
        if (!c.online) {
            warn(c.name, concat(c.name, " is not online. A file goes from hand to hand."));
            return refresh();
        }
        FileChooser chooser(concat("A file for ", to), folder_);
        reports_.line_soon("asks-for-file");
        std::filesystem::path path = chooser.choose(main_);
        if (path.empty()) return;
        folder_ = path.parent_path();
        offer(to, path);
    }
    // Absolute paths, or file:// addresses, one on each line.
    void drop_files(const std::string& text) override {
        std::istringstream in(text);
        for (std::string line; std::getline(in, line);) {
            while (line.ends_with('\r') || line.ends_with(' ')) line.pop_back();
            if (line.empty()) continue;
            std::filesystem::path path = chatsecure::path_from(line);
            if (path.is_relative()) {  // some other text
                warn(model_.current, "Only files can be dropped here.");
                return refresh();
            }
            offer(model_.current, path);
        }
    }

    // Opens or closes the details, and says what is known now.
    void toggle_details() override {
        main_.show_details(!main_.has_details());
        reports_.line(concat("details ", main_.has_details() ? 1 : 0));
        model_.person(model_.current).number_asked = false;
        show_details();
    }
    void show_details() {
        if (!main_.has_details()) return;
        Conversation& c = model_.person(model_.current);
        if (!c.name.empty() && c.standing != Standing::refused && !c.knows_number() &&
            !std::exchange(c.number_asked, true))
            client_->try_post(chatsecure::Verify{c.name});
        main_.details.set(describe(c));
    }
    void settle() override {
        const Conversation& c = model_.shown();
        if (!c.knows_number()) return;
        post(chatsecure::Verify{c.name, !c.verified, c.number->theirs});
        main_.details.take_harmless_focus();
    }
    void toggle_ignored() override { post(chatsecure::Ignore{model_.current}); }

    // ---- Settings -------------------------------------------------------------------------------

    std::vector<MenuLine> menu() override {
        auto tick = [](bool yes) { return FL_MENU_TOGGLE | (yes ? FL_MENU_VALUE : 0); };
        return {{"Dark theme", [this] { toggle_theme(); }, tick(style.dark)},
                {"Sound for messages", [this] { toggle_sound(); }, tick(settings_["sound"] == "1")},
                {"Larger text (Ctrl +)", [this] { zoom(1); }},
                {"Smaller text (Ctrl \u2212)", [this] { zoom(-1); }},
                {"Commands and keys", [this] { show_help(); }},
                {"Quit (Ctrl Q)", [this] { close(); }}};
    }
    void toggle_theme() {
        style.dark = !style.dark;
        set_theme();
        main_.redraw();
        settings_changed();
        reports_.line(concat("dark ", style.dark ? 1 : 0));
    }
    void toggle_sound() {
        settings_["sound"] = settings_["sound"] == "1" ? "0" : "1";
        settings_changed();
    }
    void zoom(int by) override {
        style.zoom = by == 0 ? 100 : std::clamp(style.zoom + 10 * by, smallest_zoom, largest_zoom);
        main_.layout();
        settings_changed();
        reports_.line(concat("zoom ", style.zoom));
    }
    // Written soon after, once for several changes, by a thread: the window waits for no disk.
    void settings_changed() {
        settings_["dark"] = style.dark ? "1" : "0";
        settings_["zoom"] = std::to_string(style.zoom);
        Fl::remove_timeout(&App::save, this);
        Fl::add_timeout(0.5, &App::save, this);
    }
    static void save(void* data) {
        auto* self = static_cast<App*>(data);
        auto write = [self, settings = self->settings_,
                      before = std::move(self->saving_)]() mutable {
            if (before.valid()) before.get();  // one at a time
            save_settings(self->settings_file_, settings);
            Fl::awake(&App::saved, self);
        };
        self->saving_ = std::async(std::launch::async, std::move(write));
    }
    static void saved(void* data) { static_cast<App*>(data)->reports_.line("settings saved"); }

    // ---- Leaving --------------------------------------------------------------------------------

    void close() override {
        if (!client_ || main_.shown() == 0) {  // nothing has begun
            quit_ = true;
            if (client_) client_->stop();
            return;
        }
        bool unsent = !over_ && client_->waiting() > 0;
        model_.person(model_.current).draft = main_.input.value();
        std::string open;
        if (!over_ && model_.is_any_open())
            open +=
                "Files are on their way, or offered: the former can go on next time, the offers "
                "are withdrawn. ";
        if (unsent) open += "Messages wait to be sent: they will be lost. ";
        if (std::vector<std::string> to = model_.half_typed(); !to.empty())
            open += concat("What you have begun to write to ", chatsecure::listed(to),
                           " will be lost.");
        if (!open.empty() && !quitting_) {
            reports_.line_soon("asks-about-leaving");
            if (!ask(main_, open, "Leave", "Stay")) return reports_.line("stays");
        }
        // Asked twice, or nobody is there to say goodbye to. Otherwise the engine waits a little
        // for what is still on its way; what is lost without our having said so keeps the window.
        if (std::exchange(quitting_, true) || over_ || !model_.connected ||
            !client_->try_post(chatsecure::Leave{})) {
            client_->stop();
            quit_ = true;
            return;
        }
        quiet_loss_ = unsent;
        auto give_up = [](void* self) {
            if (!static_cast<App*>(self)->over_) static_cast<App*>(self)->quit_ = true;
        };
        Fl::add_timeout(10, give_up, this);
    }

    void drawn() override {
        const Fl_Group& window = main_.shown() != 0 ? static_cast<Fl_Group&>(main_) : sign_in_;
        reports_.places(window, main_.view, main_.list);
    }

    Flags flags_;
    Model model_;
    Reports reports_{flags_.report};
    std::filesystem::path settings_file_ = flags_.options.home / "window";
    Settings settings_ = load_settings(settings_file_);
    std::future<void> saving_;  // its destructor joins the thread
    std::string verifying_;     // whose safety number a line has asked for
    std::string reply_to_, title_;
    std::filesystem::path folder_;                  // where the last file was chosen
    std::string no_connection_;                     // why; empty: there is one
    Time time_ = std::chrono::system_clock::now();  // of the event that is being handled
    bool registering_ = false, over_ = false, quitting_ = false, quit_ = false;
    std::size_t lost_ = 0;     // messages that failed while we were leaving,
    bool quiet_loss_ = false;  // which the user had not agreed to
    SignIn sign_in_{*this};
    MainWindow main_{model_, *this};
    std::atomic<bool> woken_ = false;             // take_events is on its way
    std::unique_ptr<chatsecure::Client> client_;  // last: its thread uses the line above
};

cxxopts::Options make_options() {
    cxxopts::Options options("gui_client_fltk", "The ChatSecure client in a window.\n");
    options.positional_help("[HOST[:PORT]]");
    auto add = options.add_options();
    auto text = [] { return cxxopts::value<std::string>(); };
    add("server", "where the server is", text(), "HOST[:PORT]");
    add("u,user", "your user name", text(), "NAME");
    add("register", "make the account first");
    add("password-file",
        "its first line is the password (else CHATSECURE_PASSWORD, else the window)", text(),
        "FILE");
    add("server-key", "the server's public key, or its fingerprint SHA256:...", text(),
        "FILE|FINGERPRINT");
    add("accept-new", "trust the key of a server that is not known yet");
    add("home", "directory of identities, pins and settings",
        text()->default_value(chatsecure::default_home().string()), "DIR");
    add("downloads", "where received files go; made when needed",
        text()->default_value(chatsecure::default_downloads().string()), "DIR");
    add("trace", "write what the program does, layer by layer, into a file (trace.txt)",
        text()->implicit_value("trace.txt"), "FILE");
    add("trace-secrets", "and the keys of this run: to look at it, not to talk in it");
    add("report", "print what the window shows: for tests");
    add("version", "print the version and exit");
    add("help", "print this and exit");
    options.parse_positional({"server"});
    return options;
}
constexpr const char* examples =
    "\nExamples:\n"
    "  ./gui_client_fltk                                        asks for everything\n"
    "  ./gui_client_fltk chat.example.org -u alice --register   a new account there\n";

}  // namespace

int main(int argc, char** argv) {
    chatsecure::open_standard_descriptors();
    argv = chatsecure::arguments_in_utf8(argc, argv);
    std::setlocale(LC_ALL, "");
    cxxopts::Options options = make_options();
    Flags flags;
    try {
        cxxopts::ParseResult given = options.parse(argc, argv);
        if (!given.unmatched().empty())
            throw chatsecure::Error(concat("\"", given.unmatched()[0], "\" is one word too many."));
        if (given.count("help") > 0) return std::cout << options.help() << examples, 0;
        if (given.count("version") > 0)
            return std::cout << "ChatSecure window " << chatsecure::version << '\n', 0;
        auto text = [&](const char* flag) {
            return given.count(flag) > 0 ? given[flag].as<std::string>() : "";
        };
        flags.form.server = text("server");
        if (!flags.form.server.empty()) chatsecure::parse_host_port(flags.form.server, 5000);
        flags.form.user = text("user");
        flags.form.register_account = given.count("register") > 0;
        flags.options.accept_new_server = given.count("accept-new") > 0;
        flags.report = given.count("report") > 0;
        flags.options.trace =
            chatsecure::tracer_from(text("trace"), given.count("trace-secrets") > 0)("window");
        flags.options.home = chatsecure::path_of(given["home"].as<std::string>());
        flags.options.files.downloads = chatsecure::path_of(given["downloads"].as<std::string>());
        if (given.count("server-key") > 0)
            flags.options.server_key = chatsecure::fingerprint_from(text("server-key"));
        if (std::optional<chatsecure::SecretBytes> password =
                chatsecure::find_password(text("password-file")))
            flags.form.password = *password;
    } catch (const std::exception& e) {
        std::cerr << "gui_client_fltk: " << e.what()
                  << "\n./gui_client_fltk --help lists the flags.\n";
        return 2;
    }
    chatsecure::make_write_errors_errors();
    Fl::lock();                                                 // several threads: Fl::awake works
    Fl::set_boxtype(FL_DOWN_BOX, draw_field_box, 6, 3, 12, 6);  // of every widget of FLTK
    Fl::set_boxtype(FL_UP_BOX, draw_field_box, 2, 2, 4, 4);
    Fl::set_boxtype(message_box, draw_field_box, 6, 7, 12, 13);
#ifdef CHATSECURE_PANGO
    static PangoDriver driver;
    Fl_Display_Device* display = Fl_Display_Device::display_device();
    delete display->driver();
    display->driver(&driver);
    display->set_current();
#endif
    Fl_Window::default_icon(static_cast<Fl_RGB_Image*>(&disc(64, FL_BLUE)));  // in the taskbar
    return App(std::move(flags)).run();
}
