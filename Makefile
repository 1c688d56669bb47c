# ChatSecure. `make help` lists what can be made.

CXXFLAGS ?= -O2 -g
WARNINGS ?= -Wall -Wextra -Wpedantic -Wshadow -Wconversion
PREFIX   ?= /usr/local
O        ?= .# where to build; make takes ./server and server for the same file
PKG_CONFIG ?= pkg-config
FLTK_CONFIG ?= fltk-config

# What `make deps` installs, by package manager. All of them are the distribution's own packages.
APT    := g++ make pkg-config libssl-dev openssl libcxxopts-dev doctest-dev libedit-dev \
          libfltk1.3-dev libpango1.0-dev
DNF    := gcc-c++ make pkgconf-pkg-config openssl-devel openssl cxxopts-devel doctest-devel \
          libedit-devel fltk-devel
PACMAN := gcc make pkgconf openssl cxxopts doctest libedit fltk
APK    := g++ make pkgconf openssl-dev openssl cxxopts-dev doctest-dev libedit-dev fltk-dev
BREW   := pkg-config openssl@3 cxxopts doctest fltk
# And for checks of the window: a display that nobody sees, a mouse that nobody holds, a font.
ifneq ($(filter %-gui,$(filter-out run-gui,$(MAKECMDGOALS))),)
APT    += xvfb xdotool x11-utils fonts-dejavu-core
DNF    += xorg-x11-server-Xvfb xdotool xprop dejavu-sans-fonts
PACMAN += xorg-server-xvfb xdotool xorg-xprop ttf-dejavu
APK    += xvfb xdotool xprop font-dejavu
PROGRAMS := Xvfb xdotool xprop
endif

# Which of the libraries are missing. Tried with the compiler itself, wherever they come from.
CRYPTO_CFLAGS = $(shell $(PKG_CONFIG) --cflags libcrypto 2>/dev/null)
CRYPTO_LIBS   = $(shell $(PKG_CONFIG) --libs libcrypto 2>/dev/null || echo -lcrypto)
has = $(shell printf '\043include <$(1)>\n' | \
        $(CXX) $(CPPFLAGS) $(CRYPTO_CFLAGS) -std=c++20 -E -x c++ - >/dev/null 2>&1 && echo yes)

# ---- make deps, alone or before other goals -----------------------------------------------------
#
# `make deps test` installs first and builds then, also with -j. What there is to build with is
# found out when make starts, so the other goals go to a second make, after the installation.

ifneq ($(filter deps,$(MAKECMDGOALS)),)

HEADERS := openssl/core_names.h cxxopts.hpp doctest/doctest.h histedit.h FL/Fl.H
PROGRAMS += openssl
without = $(strip $(foreach h,$(HEADERS),$(if $(call has,$(h)),,$(h))) \
                  $(foreach p,$(PROGRAMS),$(shell command -v $(p) >/dev/null || echo $(p))))
OTHERS := $(filter-out deps,$(MAKECMDGOALS))
.PHONY: $(MAKECMDGOALS)

deps:
	@if [ -n "$(without)" ]; then \
	    if [ "$$(id -u)" = 0 ]; then sudo=; else sudo=sudo; fi; \
	    if   command -v apt-get >/dev/null; then \
	        $$sudo env DEBIAN_FRONTEND=noninteractive sh -c \
	            'apt-get update -qq && \
	             apt-get install -y -qq --no-install-recommends $(APT)' >/dev/null; \
	    elif command -v dnf     >/dev/null; then $$sudo dnf install -y $(DNF); \
	    elif command -v pacman  >/dev/null; then $$sudo pacman -S --needed --noconfirm $(PACMAN); \
	    elif command -v apk     >/dev/null; then $$sudo apk add $(APK); \
	    elif command -v brew    >/dev/null; then brew install $(BREW); \
	    else echo "deps: no package manager that I know. Install a C++20 compiler, OpenSSL 3," \
	              "cxxopts, doctest, libedit and FLTK, with their headers."; exit 1; \
	    fi; \
	fi
	@echo "deps: everything is there."

ifneq ($(OTHERS),)
$(firstword $(OTHERS)): deps
	@$(MAKE) --no-print-directory $(OTHERS)
$(wordlist 2,$(words $(OTHERS)),$(OTHERS)): $(firstword $(OTHERS)) ;
endif

else

# ---- Everything else ----------------------------------------------------------------------------

.PHONY: all test demo illustrated fuzz endure bench bench-hostile bench-gui check-gui
.PHONY: check-portable run-gui sabotage clean install help no-window
all: $(O)/server $(O)/client

# The window client, where FLTK is.
FLTK_CFLAGS = $(shell $(FLTK_CONFIG) --cxxflags 2>/dev/null)
FLTK_LIBS   = $(shell $(FLTK_CONFIG) --ldflags 2>/dev/null)
# FLTK 1.3 joins no Arabic and has boxes for emoji, unless Pango is there to draw them on X11.
ifneq ($(filter 1.3.%,$(shell $(FLTK_CONFIG) --version 2>/dev/null)),)
ifeq ($(shell $(PKG_CONFIG) --exists pangoxft && echo yes),yes)
FLTK_CFLAGS += -DCHATSECURE_PANGO $(shell $(PKG_CONFIG) --cflags pangoxft)
FLTK_LIBS   += $(shell $(PKG_CONFIG) --libs pangoxft)
endif
endif
ifeq ($(shell command -v $(FLTK_CONFIG)),)
all: no-window
no-window:
	@echo "FLTK is missing, so there is no window client. 'make deps all' installs and builds it."
else
all: $(O)/gui_client_fltk
endif

ifneq ($(O),.)
$(shell mkdir -p $(O))
.PHONY: server client tests gui_client_fltk
server client tests gui_client_fltk: %: $(O)/%
endif

# Where libedit is, the client has history, completion and a line that survives incoming messages.
ifeq ($(call has,histedit.h),yes)
EDIT_CFLAGS := -DCHATSECURE_LIBEDIT
EDIT_LIBS   := -ledit
endif

# On 32-bit systems: files of more than 2 GiB, times after 2038. On others it changes nothing.
LARGE   = -D_FILE_OFFSET_BITS=64 -D_TIME_BITS=64
NEEDED  = $(CPPFLAGS) -std=c++20 $(LARGE) $(CRYPTO_CFLAGS) -pthread
COMPILE = $(CXX) $(NEEDED) $(WARNINGS) $(CXXFLAGS)
# The tests are many and each runs once: without optimisation they build in half the time, and the
# cryptography, which is most of what they wait for, is OpenSSL's. What measures is built by itself.
TEST_FLAGS     = -O0
$(O)/tests: CXXFLAGS := $(if $(filter file,$(origin CXXFLAGS)),$(TEST_FLAGS),$(CXXFLAGS))
need = $(if $(call has,$(1)),,@echo "$(1) is missing: 'make deps' installs it ($(2))." && exit 1)

$(O)/server: server.cpp chatsecure.hpp Makefile
	$(call need,openssl/core_names.h,OpenSSL 3)
	$(call need,cxxopts.hpp,cxxopts)
	$(COMPILE) -o $@ $< $(LDFLAGS) $(CRYPTO_LIBS)

$(O)/client: client.cpp chatsecure.hpp Makefile
	$(call need,openssl/core_names.h,OpenSSL 3)
	$(call need,cxxopts.hpp,cxxopts)
	$(COMPILE) $(EDIT_CFLAGS) -o $@ $< $(LDFLAGS) $(CRYPTO_LIBS) $(EDIT_LIBS)

$(O)/gui_client_fltk: gui_client_fltk.cpp chatsecure.hpp Makefile
	$(call need,openssl/core_names.h,OpenSSL 3)
	$(call need,cxxopts.hpp,cxxopts)
	$(call need,FL/Fl.H,FLTK)
	$(COMPILE) $(FLTK_CFLAGS) -o $@ $< $(LDFLAGS) $(FLTK_LIBS) $(CRYPTO_LIBS)

$(O)/tests: tests.cpp chatsecure.hpp Makefile
	$(call need,openssl/core_names.h,OpenSSL 3)
	$(call need,doctest/doctest.h,doctest)
	$(COMPILE) -o $@ $< $(LDFLAGS) $(CRYPTO_LIBS)

# The tests start the real server and client, which stand beside them.
test: $(O)/tests $(O)/server $(O)/client
	$(O)/tests

# DEMO=slow: step by step, with Enter.
demo: $(O)/tests $(O)/server $(O)/client
	@DEMO=$(DEMO) $(O)/tests --demo

# A whole conversation on one page: each byte, and a command for each value. docs/illustrated.html
# is such a page, put there by hand: make illustrated && cp illustrated.html docs/
illustrated: $(O)/tests
	@$(O)/tests --illustrated $(O)/illustrated.html
	@echo "$(O)/illustrated.html: open it with a browser"

# Measured by programs that are optimised, all of them.
MEASURED := $(if $(filter .,$(O)),build,$(O))/measured
bench bench-hostile bench-gui:
	@$(MAKE) --no-print-directory O=$(MEASURED) TEST_FLAGS=-O1 \
	    $(addprefix $(MEASURED)/,tests server client $(if $(filter %gui,$@),gui_client_fltk))
	@$(MEASURED)/tests --$@

# Bytes that nobody thought of, for everything that takes bytes from outside: the last part of
# tests.cpp. What was found out (and what was found) stays in this folder for the next time.
FUZZ_CXX     ?= clang++
FUZZ_SECONDS ?= 10
FUZZ         := $(if $(filter .,$(O)),build,$(O))/fuzz
FUZZ_FLAGS   := -O1 -g1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all

# With the test cases left out, whose tools are then unused.
$(FUZZ)/fuzz: tests.cpp chatsecure.hpp Makefile
	@mkdir -p $(FUZZ)
	@echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }' | \
	    $(FUZZ_CXX) $(FUZZ_FLAGS) -x c++ - -o $@.probe 2>/dev/null || { \
	    echo "make fuzz needs clang with libFuzzer: on Debian the packages clang and" \
	         "libclang-rt-NN-dev (NN: clang's version)."; exit 1; }
	$(FUZZ_CXX) $(NEEDED) $(WARNINGS) -Wno-unused -Wno-unused-parameter $(FUZZ_FLAGS) \
	    -DCHATSECURE_FUZZ -DDOCTEST_CONFIG_DISABLE -o $@ $< $(LDFLAGS) $(CRYPTO_LIBS)

fuzz: $(FUZZ)/fuzz
	@FUZZ_SECONDS=$(FUZZ_SECONDS) $(FUZZ)/fuzz

# Twenty people, and all that can happen to them. MINUTES=60 for longer, SEED=7 for the same dice.
endure: $(O)/tests $(O)/server $(O)/client
	@MINUTES=$(or $(MINUTES),5) $(if $(SEED),SEED=$(SEED)) $(O)/tests --endure

# Drives the real window in a display of its own, with mouse and keys.
check-gui: $(O)/tests $(O)/server $(O)/client $(O)/gui_client_fltk
	$(O)/tests --check-gui

# Other processors, on this one: 32 bits, and the bytes of numbers the other way round; Windows.
check-portable:
	.ci/portable $(ONLY)

# Breaks the header in many small ways, and sees whether the tests notice. clang++ is much quicker.
SABOTAGED = $(or $(shell command -v clang++),$(CXX)) $(NEEDED) -O0
sabotage: $(O)/tests
	@SABOTAGE_COMPILE='$(SABOTAGED)' SABOTAGE_LIBS='$(LDFLAGS) $(CRYPTO_LIBS)' \
	    $(O)/tests --sabotage $(ONLY)

# A window on the server of this machine; if none runs, on one that lives as long as the window.
run-gui: $(O)/server $(O)/gui_client_fltk
	@: >run-gui.log; $(O)/server --data run-gui-data 2>>run-gui.log & server=$$!; \
	while kill -0 $$server 2>/dev/null && ! grep -q 'server key' run-gui.log; do sleep 0.1; done; \
	$(O)/gui_client_fltk localhost:5000; kill $$server 2>/dev/null || true

# ---- make install -------------------------------------------------------------------------------
#
# What a system wants to have of a program is made here: manual pages out of what --help says, the
# shell's completion, a service, an icon.

# An awk program: --help becomes a page for man(1). A line that ends in a colon is a heading; two
# blanks stand between a flag and what it means; what has no flag goes on with the line before.
define MAN_PAGE
BEGIN { print ".TH " toupper(name) " 1" }
{ gsub(/\\/, "\\\\"); gsub(/-/, "\\-") }
NR == 1 { sub(/[.]$$/, ""); print ".SH NAME"; print name " \\- " $$0; next }
/^[A-Z].*:$$/ { sub(/:$$/, ""); usage = /Usage/; verbatim = /Example/
               print ".SH " (usage ? "SYNOPSIS" : toupper($$0))
               print verbatim ? ".nf" : ".P"; next }
verbatim { if ($$0 == "") { print ".fi"; verbatim = 0 } else print; next }
usage { sub(/^ +[^ ]+/, name); print; print ".SH OPTIONS"; usage = 0; next }
{ sub(/^ +/, ""); at = match($$0, /   *[^ ]/)
  if (at > 0 || /^\\-/) { print ".TP"; print ".B " (at > 0 ? substr($$0, 1, at - 1) : $$0)
                          $$0 = at > 0 ? substr($$0, at) : ""; sub(/^ +/, "") }
  if ($$0 != "") print (/^[.]/ ? "\\&" : "") $$0 }
endef

define COMPLETION
_chatsecure() {
    local word="$${COMP_WORDS[COMP_CWORD]}"
    if [[ $$word == -* ]]; then
        COMPREPLY=($$(compgen -W "$$("$$1" --help | grep -o -e ' --[a-z-]*')" -- "$$word"))
    fi
}
complete -o default -F _chatsecure chatsecure-server chatsecure-client chatsecure-window
endef

# The server for everybody who can reach this machine, as a user that exists while it runs and that
# can do nothing but that. Its data is in /var/lib/chatsecure.
define SERVICE
[Unit]
Description=ChatSecure server
After=network-online.target
Wants=network-online.target

[Service]
ExecStart=$(PREFIX)/bin/chatsecure-server --bind :: --data %S/chatsecure
Restart=on-failure
DynamicUser=yes
StateDirectory=chatsecure
StateDirectoryMode=0700
UMask=0077
LimitNOFILE=16384
CapabilityBoundingSet=
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
ProtectProc=invisible
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
PrivateTmp=yes
PrivateDevices=yes
PrivateUsers=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged

[Install]
WantedBy=multi-user.target
endef

define DESKTOP
[Desktop Entry]
Type=Application
Name=ChatSecure
Comment=Encrypted chat
Exec=chatsecure-window
Icon=chatsecure
Categories=Network;Chat;InstantMessaging;
StartupNotify=false
endef

define ICON
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">
<rect width="64" height="64" rx="14" fill="steelblue"/>
<path d="M11 13h42v30H31L20 54V43h-9z" fill="white"/>
<path d="M27 27v-4a5 5 0 0 1 10 0v4" fill="none" stroke="steelblue" stroke-width="3"/>
<rect x="24" y="26" width="16" height="12" rx="2" fill="steelblue"/>
</svg>
endef

export MAN_PAGE COMPLETION SERVICE DESKTOP ICON
SHARE = $(DESTDIR)$(PREFIX)/share
# With a home that is nobody's: what --help says of it is true for everybody.
man = env -u XDG_DATA_HOME HOME=/home/YOU $(O)/$(1) --help | \
      sed 's|/home/YOU|~|; s|\./$(1)|chatsecure-$(2)|' | \
      awk -v name=chatsecure-$(2) "$$MAN_PAGE" >$(SHARE)/man/man1/chatsecure-$(2).1

install: $(O)/server $(O)/client
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/include $(SHARE)/man/man1
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system $(SHARE)/bash-completion/completions
	install -d $(SHARE)/doc/chatsecure
	install -m 755 $(O)/server $(DESTDIR)$(PREFIX)/bin/chatsecure-server
	install -m 755 $(O)/client $(DESTDIR)$(PREFIX)/bin/chatsecure-client
	install -m 644 chatsecure.hpp $(DESTDIR)$(PREFIX)/include/chatsecure.hpp
	install -m 644 README.md users.db.example $(SHARE)/doc/chatsecure/
	$(call man,server,server)
	$(call man,client,client)
	for name in server client window; do \
	    printf '%s\n' "$$COMPLETION" >$(SHARE)/bash-completion/completions/chatsecure-$$name; done
	printf '%s\n' "$$SERVICE" >$(DESTDIR)$(PREFIX)/lib/systemd/system/chatsecure-server.service
ifneq ($(wildcard $(O)/gui_client_fltk),)
	install -d $(SHARE)/applications $(SHARE)/icons/hicolor/scalable/apps
	install -m 755 $(O)/gui_client_fltk $(DESTDIR)$(PREFIX)/bin/chatsecure-window
	$(call man,gui_client_fltk,window)
	printf '%s\n' "$$DESKTOP" >$(SHARE)/applications/chatsecure-window.desktop
	printf '%s\n' "$$ICON" >$(SHARE)/icons/hicolor/scalable/apps/chatsecure.svg
endif

clean:
	rm -rf server client gui_client_fltk tests build illustrated.html

help:
	@echo "make           builds ./server, ./client and ./gui_client_fltk (installs nothing)"
	@echo "make deps      installs what is missing, with the system's package manager;"
	@echo "               'make deps demo' and 'make deps test' work on a fresh machine"
	@echo "make demo      shows a real conversation, and what a wire tap sees of it;"
	@echo "               DEMO=slow: step by step, for a projector"
	@echo "make illustrated writes illustrated.html: each byte of a conversation, explained"
	@echo "make test      builds and runs the tests"
	@echo "make fuzz      feeds random bytes to all that takes bytes, FUZZ_SECONDS (10) each"
	@echo "make endure    twenty people, all that can happen to them, for MINUTES (5); SEED"
	@echo "make bench     measures logins, relaying, round trips and files"
	@echo "make bench-hostile measures what hostile members and strangers can do"
	@echo "make run-gui   starts a server, if none runs, and opens a window"
	@echo "make check-gui drives that window, in a display that nobody sees"
	@echo "make bench-gui measures it under a flood of messages"
	@echo "make check-portable builds, tests and talks with i386, arm64, s390x, Windows (Debian, root)"
	@echo "make sabotage  breaks the header in many small ways: the tests must notice each"
	@echo "make install   into PREFIX ($(PREFIX)), below DESTDIR: programs, header, man pages,"
	@echo "               completion for bash, a service for systemd, the window's menu entry"
	@echo "make clean     removes what was built"
	@echo "Variables: CXX, CXXFLAGS, O (where to build):"
	@echo "               make test O=build/asan CXXFLAGS=-fsanitize=address"

endif
