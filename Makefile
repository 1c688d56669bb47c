# ChatSecure. `make help` lists what can be made.

CXXFLAGS ?= -O2 -g
WARNINGS ?= -Wall -Wextra -Wpedantic -Wshadow -Wconversion
PREFIX   ?= /usr/local
O        ?= .# where to build; make takes ./server and server for the same file
PKG_CONFIG ?= pkg-config
FLTK_CONFIG ?= fltk-config

# What `make deps` installs, by package manager. All of them are the distribution's own packages.
APT    := g++ make pkg-config libssl-dev openssl libcxxopts-dev doctest-dev libedit-dev \
          libfltk1.3-dev
DNF    := gcc-c++ make pkgconf-pkg-config openssl-devel openssl cxxopts-devel doctest-devel \
          libedit-devel fltk-devel
PACMAN := gcc make pkgconf openssl cxxopts doctest libedit fltk
APK    := g++ make pkgconf openssl-dev openssl cxxopts-dev doctest-dev libedit-dev fltk-dev
BREW   := pkg-config openssl@3 cxxopts doctest fltk
# And for checks of the window: a display that nobody sees, a mouse that nobody holds, a font.
ifneq ($(filter %-gui,$(filter-out run-gui,$(MAKECMDGOALS))),)
APT    += xvfb xdotool fonts-dejavu-core
DNF    += xorg-x11-server-Xvfb xdotool dejavu-sans-fonts
PACMAN += xorg-server-xvfb xdotool ttf-dejavu
APK    += xvfb xdotool font-dejavu
PROGRAMS := Xvfb xdotool
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

.PHONY: all test demo fuzz endure bench bench-hostile bench-gui check-gui run-gui clean install
.PHONY: help no-window
all: $(O)/server $(O)/client

# The window client, where FLTK is.
FLTK_CFLAGS = $(shell $(FLTK_CONFIG) --cxxflags 2>/dev/null)
FLTK_LIBS   = $(shell $(FLTK_CONFIG) --ldflags 2>/dev/null)
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

COMPILE = $(CXX) $(CPPFLAGS) -std=c++20 $(WARNINGS) $(CXXFLAGS) $(CRYPTO_CFLAGS) -pthread
# The tests are many and each runs once: they build in half the time with less optimisation.
$(O)/tests: CXXFLAGS := $(if $(filter file,$(origin CXXFLAGS)),-O1,$(CXXFLAGS))
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

demo: $(O)/tests $(O)/server $(O)/client
	@$(O)/tests --demo

bench: $(O)/tests $(O)/server $(O)/client
	@$(O)/tests --bench

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
	$(FUZZ_CXX) $(CPPFLAGS) -std=c++20 $(WARNINGS) -Wno-unused -Wno-unused-parameter \
	    $(FUZZ_FLAGS) -DCHATSECURE_FUZZ -DDOCTEST_CONFIG_DISABLE $(CRYPTO_CFLAGS) -pthread \
	    -o $@ $< $(LDFLAGS) $(CRYPTO_LIBS)

fuzz: $(FUZZ)/fuzz
	@FUZZ_SECONDS=$(FUZZ_SECONDS) $(FUZZ)/fuzz

# Twenty people, and all that can happen to them. MINUTES=60 for longer, SEED=7 for the same dice.
endure: $(O)/tests $(O)/server $(O)/client
	@MINUTES=$(or $(MINUTES),5) $(if $(SEED),SEED=$(SEED)) $(O)/tests --endure

# One member floods another: what that one notices of it.
bench-hostile: $(O)/tests $(O)/server $(O)/client
	@$(O)/tests --bench-hostile

# Drives the real window in a display of its own, with mouse and keys.
bench-gui: $(O)/tests $(O)/server $(O)/client $(O)/gui_client_fltk
	@$(O)/tests --bench-gui

check-gui: $(O)/tests $(O)/server $(O)/client $(O)/gui_client_fltk
	$(O)/tests --check-gui

# A window on the server of this machine; if none runs, on one that lives as long as the window.
run-gui: $(O)/server $(O)/gui_client_fltk
	@: >run-gui.log; $(O)/server --data run-gui-data 2>>run-gui.log & server=$$!; \
	while kill -0 $$server 2>/dev/null && ! grep -q 'server key' run-gui.log; do sleep 0.1; done; \
	$(O)/gui_client_fltk localhost:5000; kill $$server 2>/dev/null || true

install: $(O)/server $(O)/client
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/include
	install -d $(DESTDIR)$(PREFIX)/share/doc/chatsecure
	install -m 755 $(O)/server $(DESTDIR)$(PREFIX)/bin/chatsecure-server
	install -m 755 $(O)/client $(DESTDIR)$(PREFIX)/bin/chatsecure-client
	if [ -e $(O)/gui_client_fltk ]; then install -m 755 $(O)/gui_client_fltk \
	    $(DESTDIR)$(PREFIX)/bin/chatsecure-window; fi
	install -m 644 chatsecure.hpp $(DESTDIR)$(PREFIX)/include/chatsecure.hpp
	install -m 644 README.md users.db.example $(DESTDIR)$(PREFIX)/share/doc/chatsecure/

clean:
	rm -rf server client gui_client_fltk tests build

help:
	@echo "make           builds ./server, ./client and ./gui_client_fltk (installs nothing)"
	@echo "make deps      installs what is missing, with the system's package manager;"
	@echo "               'make deps demo' and 'make deps test' work on a fresh machine"
	@echo "make demo      shows a real conversation, and what a wire tap sees of it"
	@echo "make test      builds and runs the tests"
	@echo "make fuzz      feeds random bytes to all that takes bytes, FUZZ_SECONDS (10) each"
	@echo "make endure    twenty people, all that can happen to them, for MINUTES (5); SEED"
	@echo "make bench     measures logins, relaying, round trips and files"
	@echo "make bench-hostile measures what one hostile member can do to another member"
	@echo "make run-gui   starts a server, if none runs, and opens a window"
	@echo "make check-gui drives that window, in a display that nobody sees"
	@echo "make bench-gui measures it under a flood of messages"
	@echo "make install   into PREFIX ($(PREFIX)), below DESTDIR; the header too"
	@echo "make clean     removes what was built"
	@echo "Variables: CXX, CXXFLAGS, O (where to build):"
	@echo "               make test O=build/asan CXXFLAGS=-fsanitize=address"

endif
