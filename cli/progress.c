/* SPDX-License-Identifier: Apache-2.0 */
/*
 * progress.c - the reporter thread and its four styles. See progress.h.
 */
#include "progress.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "signals.h"
#include "tv/alloc.h"
#include "tv/sys.h"
#include "tv/text.h"

#define BAR_MS   200L
#define JSON_MS  1000L
#define PLAIN_MS 10000L

struct tvc_progress {
    struct tvc_print *print;
    const char *verb, *unit;
    pthread_t thread;
    pthread_mutex_t lock; /* guards what follows */
    sem_t wake;
    bool stop, started;
    uint64_t items, items_total, bytes, bytes_total;
    /* done before this process began: no rate */
    uint64_t bytes_first, items_first;
    double begin;
};

double tvc_seconds(void)
{
    struct timespec t = {0};
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

uint64_t tvc_memory(const char *field)
{
    char text[4096] = "";
    const int fd = tv_sys()->open("/proc/self/status", O_RDONLY | O_CLOEXEC, 0);
    if (fd < 0)
        return 0;
    const ssize_t n = tv_sys()->pread(fd, text, sizeof text - 1, 0);
    (void)tv_sys()->close(fd);
    if (n <= 0)
        return 0;
    text[n] = '\0';
    const size_t len = strlen(field);
    for (const char *line = text; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, field, len) == 0 && line[len] == ':')
            return strtoull(line + len + 1, NULL, 10) * 1024;
    }
    return 0;
}

struct snapshot {
    uint64_t items, items_total, bytes, bytes_total;
    bool by_items;    /* there are no bytes to go by: tokens, layers */
    double rate, eta; /* of bytes or items; eta < 0: unknown */
};

static struct snapshot look(struct tvc_progress *g)
{
    (void)pthread_mutex_lock(&g->lock);
    struct snapshot s = {.items = g->items,
                         .items_total = g->items_total,
                         .bytes = g->bytes,
                         .bytes_total = g->bytes_total,
                         .eta = -1};
    const double passed = tvc_seconds() - g->begin;
    s.by_items = s.bytes_total == 0;
    const uint64_t done = s.by_items ? s.items : s.bytes;
    const uint64_t total = s.by_items ? s.items_total : s.bytes_total;
    const uint64_t first = s.by_items ? g->items_first : g->bytes_first;
    if (g->started && passed > 0 && done > first)
        s.rate = (double)(done - first) / passed;
    (void)pthread_mutex_unlock(&g->lock);
    if (s.rate > 0 && total >= done)
        s.eta = (double)(total - done) / s.rate;
    return s;
}

static void text_of(const struct tvc_progress *g, const struct snapshot *s,
                    char *dst, size_t cap)
{
    char rss[32];
    char eta[32] = "?";
    char items[64] = "";
    char rate[48] = "";
    unsigned percent = 0;
    if (s->by_items && s->items_total > 0)
        percent = (unsigned)((double)s->items * 100 / (double)s->items_total);
    else if (s->bytes_total > 0)
        percent = (unsigned)((double)s->bytes * 100 / (double)s->bytes_total);
    if (!s->by_items)
        (void)snprintf(rate, sizeof rate, "%.0f MB/s  ", s->rate / 1e6);
    else if (g->unit && s->rate > 0)
        (void)snprintf(rate, sizeof rate, "%.*f %s/s  ", s->rate < 10 ? 1 : 0,
                       s->rate, g->unit);
    if (s->eta >= 0)
        tvc_duration(s->eta, eta, sizeof eta);
    if (g->unit)
        (void)snprintf(items, sizeof items, " %" PRIu64 "/%" PRIu64 " %s",
                       s->items, s->items_total, g->unit);
    tv_format_bytes(tvc_memory("VmRSS"), rss, sizeof rss);
    (void)snprintf(dst, cap, "%s%s  %u%%  %seta %s  rss %s", g->verb, items,
                   percent > 100 ? 100 : percent, rate, eta, rss);
}

static void json_of(const struct tvc_progress *g, const struct snapshot *s,
                    char *dst, size_t cap)
{
    json_t *doc = json_pack(
        "{s:s, s:s, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "event", "progress",
        "phase", g->verb, "items_done", tvc_json_u64(s->items), "items_total",
        tvc_json_u64(s->items_total), "bytes_done", tvc_json_u64(s->bytes),
        "bytes_total", tvc_json_u64(s->bytes_total), "bytes_per_second",
        tvc_json_u64(s->by_items ? 0 : (uint64_t)s->rate), "eta_seconds",
        s->eta >= 0 ? tvc_json_u64((uint64_t)s->eta) : json_null(), "rss_bytes",
        tvc_json_u64(tvc_memory("VmRSS")));
    const size_t n = doc ? json_dumpb(doc, dst, cap - 1, JSON_COMPACT) : 0;
    dst[n < cap ? n : 0] = '\0';
    json_decref(doc);
}

static void report(struct tvc_progress *g, bool asked)
{
    char line[512];
    const struct snapshot s = look(g);
    const enum tvc_progress_mode mode = g->print->progress;

    if (mode == TVC_PROGRESS_JSON) {
        json_of(g, &s, line, sizeof line);
        tvc_progress_line(g->print, line);
        return;
    }
    text_of(g, &s, line, sizeof line);
    if (mode == TVC_PROGRESS_BAR && !asked) {
        struct winsize w = {0};
        const bool known = ioctl(STDERR_FILENO, TIOCGWINSZ, &w) == 0;
        if (known && w.ws_col > 1 && strlen(line) >= w.ws_col)
            line[w.ws_col - 1] = '\0';
        tvc_bar(g->print, line);
    } else {
        tvc_progress_line(g->print, line);
    }
}

static long interval_ms(enum tvc_progress_mode mode)
{
    switch (mode) {
    case TVC_PROGRESS_BAR:
        return BAR_MS;
    case TVC_PROGRESS_JSON:
        return JSON_MS;
    case TVC_PROGRESS_PLAIN:
        return PLAIN_MS;
    case TVC_PROGRESS_AUTO:
    case TVC_PROGRESS_NONE:
        break;
    }
    return 0;
}

/* True when something woke us, false when the interval passed. */
static bool wait_for(struct tvc_progress *g, long ms)
{
    if (ms == 0) {
        while (sem_wait(&g->wake) != 0 && errno == EINTR)
            ;
        return true;
    }
    struct timespec t = {0};
    (void)clock_gettime(CLOCK_REALTIME, &t);
    t.tv_sec += ms / 1000;
    t.tv_nsec += ms % 1000 * 1000000;
    if (t.tv_nsec >= 1000000000) {
        t.tv_sec++;
        t.tv_nsec -= 1000000000;
    }
    for (;;) {
        if (sem_timedwait(&g->wake, &t) == 0)
            return true;
        if (errno != EINTR)
            return false;
    }
}

static void *reporter(void *arg)
{
    struct tvc_progress *g = arg;
    const long ms = interval_ms(g->print->progress);
    for (;;) {
        const bool woken = wait_for(g, ms);
        (void)pthread_mutex_lock(&g->lock);
        const bool stop = g->stop;
        (void)pthread_mutex_unlock(&g->lock);
        if (stop)
            return NULL;
        const bool asked = tvc_signal_usr1();
        if (asked || !woken)
            report(g, asked);
    }
}

struct tvc_progress *tvc_progress_begin(struct tvc_print *p, const char *verb,
                                        const char *unit)
{
    struct tvc_progress *g = tv_calloc(1, sizeof *g);
    if (!g)
        return NULL;
    g->print = p;
    g->verb = verb;
    g->unit = unit;
    g->begin = tvc_seconds();
    (void)pthread_mutex_init(&g->lock, NULL);
    (void)sem_init(&g->wake, 0, 0);
    if (pthread_create(&g->thread, NULL, reporter, g) != 0) {
        (void)sem_destroy(&g->wake);
        (void)pthread_mutex_destroy(&g->lock);
        tv_free(g);
        return NULL;
    }
    tvc_signals_wake(&g->wake);
    return g;
}

void tvc_progress_set(struct tvc_progress *g, uint64_t items,
                      uint64_t items_total, uint64_t bytes,
                      uint64_t bytes_total)
{
    if (!g)
        return;
    (void)pthread_mutex_lock(&g->lock);
    if (!g->started) {
        g->started = true;
        g->bytes_first = bytes;
        g->items_first = items;
        g->begin = tvc_seconds();
    }
    g->items = items;
    g->items_total = items_total;
    g->bytes = bytes;
    g->bytes_total = bytes_total;
    (void)pthread_mutex_unlock(&g->lock);
}

void tvc_progress_end(struct tvc_progress *g)
{
    if (!g)
        return;
    tvc_signals_wake(NULL);
    (void)pthread_mutex_lock(&g->lock);
    g->stop = true;
    (void)pthread_mutex_unlock(&g->lock);
    (void)sem_post(&g->wake);
    (void)pthread_join(g->thread, NULL);
    if (g->print->progress == TVC_PROGRESS_BAR)
        tvc_bar(g->print, NULL);
    if (g->print->progress == TVC_PROGRESS_JSON)
        report(g, false);
    (void)sem_destroy(&g->wake);
    (void)pthread_mutex_destroy(&g->lock);
    tv_free(g);
}
