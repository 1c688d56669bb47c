// server: the ChatSecure relay. All of the work is in chatsecure.hpp, chapter 11; this program
// turns flags into options, signals into stop(), and log lines into stderr.

#include "chatsecure.hpp"

#include <cxxopts.hpp>
#include <iostream>

namespace {

enum ExitCode { fine = 0, trouble = 1, usage = 2 };

std::atomic<chatsecure::Server*> running_server = nullptr;  // for the signal handler only

extern "C" void on_signal(int) {
    if (chatsecure::Server* server = running_server.load()) server->stop();
}

cxxopts::Options make_options() {
    cxxopts::Options options("server",
                             "The ChatSecure server: passes on messages that it cannot read.\n");
    auto add = options.add_options();
    add("port", "TCP port; 0 picks a free one and prints it",
        cxxopts::value<std::string>()->default_value("5000"), "PORT");
    add("bind", "address to listen on; :: or 0.0.0.0 for all",
        cxxopts::value<std::string>()->default_value("127.0.0.1"), "ADDRESS");
    add("data", "directory of users.db and the server's key",
        cxxopts::value<std::string>()->default_value("."), "DIR");
    add("max-clients", "how many may be online",
        cxxopts::value<std::string>()->default_value("1000"), "N");
    add("no-register", "take no new accounts over the network");
    add("add-user", "ask for a password, write the account, and exit",
        cxxopts::value<std::string>(), "NAME");
    add("rsa-bits", "size of the key that is made at first start",
        cxxopts::value<std::string>()->default_value(std::to_string(chatsecure::default_rsa_bits)),
        "BITS");
    add("new-key", "make a new key although this directory had one that is missing");
    add("trace", "write what passes on each connection, layer by layer (standard error, or a file)",
        cxxopts::value<std::string>()->implicit_value("-"), "FILE");
    add("trace-secrets", "and the keys of this run: to look at it, not to talk in it");
    add("v,verbose", "log each relayed payload: who, to whom, how many bytes");
    add("version", "print the version and exit");
    add("help", "print this and exit");
    return options;
}

constexpr const char* examples =
    "\nExamples:\n"
    "  ./server --data data             for this machine alone\n"
    "  ./server --data data --bind ::   for the network: give out the fingerprint that it prints\n"
    "  ./server --data data --add-user alice\n";

// Throws Error for what a flag cannot be.
chatsecure::ServerOptions options_from(const cxxopts::ParseResult& flags) {
    auto number = [&](const std::string& flag, std::size_t least, std::size_t most) {
        return chatsecure::number_for("--" + flag, flags[flag].as<std::string>(), least, most);
    };
    chatsecure::ServerOptions options;
    options.data_directory = chatsecure::directory_for("--data", flags["data"].as<std::string>());
    options.bind = flags["bind"].as<std::string>();
    options.port = static_cast<std::uint16_t>(number("port", 0, 65535));
    options.max_clients = number("max-clients", 1, 1'000'000);
    options.rsa_bits =
        static_cast<int>(number("rsa-bits", chatsecure::min_rsa_bits, chatsecure::max_rsa_bits));
    options.new_key = flags.count("new-key") > 0;
    options.registration_open = flags.count("no-register") == 0;
    options.log_relayed = flags.count("verbose") > 0;
    options.trace = [to = chatsecure::tracer_from(
                         flags.count("trace") > 0 ? flags["trace"].as<std::string>() : "",
                         flags.count("trace-secrets") > 0)](std::string_view client) {
        return to(chatsecure::concat("server to ", client));
    };
    options.log = [](chatsecure::LogLevel level, const std::string& line) {
        // One string, one write: the lines of several threads do not mix.
        std::cerr << chatsecure::concat(chatsecure::rfc3339_now(), " ",
                                        level == chatsecure::LogLevel::warning ? "WARNING: " : "",
                                        chatsecure::visible(line), "\n");
    };
    return options;
}

// The password of a new account: typed twice, or the first line of a pipe.
chatsecure::SecretBytes new_password(const std::string& name) {
    if (std::optional<chatsecure::SecretBytes> given = chatsecure::find_password({})) return *given;
    chatsecure::SecretBytes first =
        chatsecure::ask_password(chatsecure::concat("Password for ", name, ": "));
    if (first != chatsecure::ask_password("The same again: "))
        throw chatsecure::Error("The two passwords are not the same. Nothing was changed.");
    return first;
}

int add_user(const std::filesystem::path& data, const std::string& name) {
    std::string user = chatsecure::fold_name(name);
    chatsecure::Server::add_account(data, user, new_password(user));
    std::cout << "Added " << user << ".\n";
    return fine;
}

int serve(chatsecure::ServerOptions options) {
    chatsecure::make_write_errors_errors();
    chatsecure::raise_descriptor_limit();
    chatsecure::share_one_heap();
    chatsecure::Server server(std::move(options));
    running_server = &server;
    chatsecure::when_asked_to_end(on_signal);
    server.run();
    running_server = nullptr;
    return fine;
}

}  // namespace

int main(int argc, char** argv) {
    chatsecure::open_standard_descriptors();
    argv = chatsecure::arguments_in_utf8(argc, argv);
    cxxopts::Options known = make_options();
    cxxopts::ParseResult flags;
    chatsecure::ServerOptions options;
    try {
        flags = known.parse(argc, argv);
        if (!flags.unmatched().empty())
            throw chatsecure::Error(
                chatsecure::concat("\"", flags.unmatched()[0], "\" is not a flag."));
        options = options_from(flags);
    } catch (const std::exception& e) {
        std::cerr << "server: " << e.what() << "\n./server --help lists the flags.\n";
        return usage;
    }
    try {
        if (flags.count("help") > 0) {
            std::cout << known.help() << examples;
            return fine;
        }
        if (flags.count("version") > 0) {
            std::cout << "ChatSecure server " << chatsecure::version << '\n';
            return fine;
        }
        if (flags.count("add-user") > 0)
            return add_user(options.data_directory, flags["add-user"].as<std::string>());
        return serve(std::move(options));
    } catch (const std::exception& e) {
        std::cerr << "server: " << e.what() << '\n';
        return trouble;
    }
}
