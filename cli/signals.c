/* SPDX-License-Identifier: Apache-2.0 */
/*
 * signals.c - handlers. They set flags, or write(2) and _exit; nothing else is
 * allowed there. Flags are atomic: a signal may be delivered to a thread of a
 * library (OpenBLAS keeps some) while ours read them.
 *
 * SIGBUS is what the kernel sends when a mapped input shrinks or its disk
 * fails while we read it. The journal makes leaving at once safe; the handler
 * names file and tensor, which is all that the user needs to know.
 */
#include "signals.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

#include "print.h"
#include "tv/sys.h"

static atomic_int cancel_flag;
static atomic_int signal_seen;
static atomic_int usr1_seen;
static volatile sig_atomic_t first_exits;
static volatile sig_atomic_t report_json;
static sem_t *_Atomic wake_up;
static const char *tool_name = "";

static int status_of(int sig)
{
    return sig == SIGINT ? 130 : 143;
}

static void on_stop(int sig)
{
    if (first_exits || signal_seen)
        _exit(status_of(sig));
    signal_seen = sig;
    cancel_flag = 1;
}

static void on_usr1(int sig)
{
    (void)sig;
    const int saved = errno;
    usr1_seen = 1;
    sem_t *const wake = wake_up;
    if (wake)
        (void)sem_post(wake);
    errno = saved;
}

struct text {
    char data[2048];
    size_t n;
};

static void text_add(struct text *t, const char *s)
{
    for (; *s && t->n < sizeof t->data; s++) {
        const unsigned char c = (unsigned char)*s;
        const int hostile =
            c < 0x20 || c == 0x7f || (report_json && (c == '"' || c == '\\'));
        t->data[t->n++] = hostile ? '?' : *s;
    }
}

static void on_bus(int sig, siginfo_t *info, void *context)
{
    (void)sig;
    (void)context;
    const char *file = NULL;
    const char *tensor = NULL;
    struct text t = {.n = 0};

    const bool known = tv_map_describe(info->si_addr, &file, &tensor);
    if (!report_json) {
        text_add(&t, tool_name);
        text_add(&t, ": error: ");
    }
    if (known && file) {
        text_add(&t, "cannot read mapped file ");
        text_add(&t, file);
        if (tensor) {
            text_add(&t, ", tensor ");
            text_add(&t, tensor);
        }
        text_add(&t, ": it was truncated while in use, or its disk failed");
    } else {
        text_add(&t, "bus error in memory that is no known file");
    }
    static const char head[] =
        "{\"error\":{\"code\":\"corrupt\",\"message\":\"";
    static const char tail[] = "\",\"hint\":\"\"}}";
    if (report_json)
        tvc_raw_stderr(head, sizeof head - 1);
    tvc_raw_stderr(t.data, t.n);
    if (report_json)
        tvc_raw_stderr(tail, sizeof tail - 1);
    tvc_raw_stderr("\n", 1);
    _exit(12);
}

static void handle(int sig, void (*fn)(int))
{
    struct sigaction sa;
    memset(&sa, 0, sizeof sa);
    sa.sa_handler = fn;
    /* Restarting keeps one stray signal from turning a write into an error:
     * the flag is polled between tensors, no call needs to break. */
    sa.sa_flags = SA_RESTART;
    (void)sigemptyset(&sa.sa_mask);
    (void)sigaction(sig, &sa, NULL);
}

void tvc_signals_install(const char *tool, bool cancellable, bool json)
{
    static unsigned char bus_stack[1 << 15];
    struct sigaction was;

    tool_name = tool;
    first_exits = !cancellable;
    report_json = json;
    handle(SIGINT, on_stop);
    handle(SIGTERM, on_stop);
    /* nohup asks for SIGHUP to be ignored. */
    if (sigaction(SIGHUP, NULL, &was) == 0 && was.sa_handler != SIG_IGN)
        handle(SIGHUP, on_stop);
    handle(SIGUSR1, on_usr1);
    /* A closed pipe or a file size limit shall be an error of write. */
    handle(SIGPIPE, SIG_IGN);
    handle(SIGXFSZ, SIG_IGN);

    const stack_t stack = {.ss_sp = bus_stack, .ss_size = sizeof bus_stack};
    (void)sigaltstack(&stack, NULL);
    struct sigaction sa;
    memset(&sa, 0, sizeof sa);
    sa.sa_sigaction = on_bus;
    sa.sa_flags = SA_SIGINFO | SA_ONSTACK;
    (void)sigemptyset(&sa.sa_mask);
    (void)sigaction(SIGBUS, &sa, NULL);
}

const atomic_int *tvc_cancel_flag(void)
{
    return &cancel_flag;
}

int tvc_signal_status(void)
{
    const int seen = signal_seen;
    return status_of(seen ? seen : SIGINT);
}

void tvc_signals_wake(sem_t *wake)
{
    wake_up = wake;
}

bool tvc_signal_usr1(void)
{
    return atomic_exchange(&usr1_seen, 0) != 0;
}
