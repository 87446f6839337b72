/* SPDX-License-Identifier: Apache-2.0 */
/*
 * signals.h - Ctrl-C, SIGTERM, SIGHUP, SIGUSR1, SIGBUS.
 *
 * The flags live in this process once, because signals do; nothing else in
 * cli/ is global.
 */
#ifndef TVC_SIGNALS_H
#define TVC_SIGNALS_H

#include <semaphore.h>
#include <stdatomic.h>
#include <stdbool.h>

/* Before any thread starts. cancellable: the first SIGINT, SIGTERM or SIGHUP
 * raises the flag of tvc_cancel_flag and the second exits; else the first one
 * exits. json: the SIGBUS report is an error document. */
void tvc_signals_install(const char *tool, bool cancellable, bool json);
const atomic_int *tvc_cancel_flag(void);
/* 130 for SIGINT, 143 for SIGTERM and SIGHUP; 130 before any came. */
int tvc_signal_status(void);
/* Semaphore to post when SIGUSR1 asks for a progress line; NULL: none. */
void tvc_signals_wake(sem_t *wake);
/* True once per SIGUSR1. */
bool tvc_signal_usr1(void);

#endif
