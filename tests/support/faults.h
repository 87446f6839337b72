/* SPDX-License-Identifier: Apache-2.0 */
/*
 * faults.h - making the N-th allocation or system call fail.
 *
 * The loops run a piece of work again and again with the fault one step later
 * each time, until it is no longer reached. Each time they check: an error
 * code and a message, no byte of tv_alloc and no file descriptor kept. The
 * work must undo what it did when it succeeds, so that it can run again.
 *
 * Counters are atomic: the work may use threads. Arming is not.
 */
#ifndef FAULTS_H
#define FAULTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tv/error.h"

/* Which calls of tv_sys() count and may fail; a mask. */
enum fault_call {
    FAULT_OPEN = 1u << 0,
    FAULT_CLOSE = 1u << 1,
    FAULT_PREAD = 1u << 2,
    FAULT_PWRITE = 1u << 3,
    FAULT_FSTAT = 1u << 4,
    FAULT_STAT = 1u << 5,
    FAULT_FTRUNCATE = 1u << 6,
    FAULT_FALLOCATE = 1u << 7,
    FAULT_FSYNC = 1u << 8,
    FAULT_FDATASYNC = 1u << 9,
    FAULT_SYNC_FILE_RANGE = 1u << 10,
    FAULT_RENAME = 1u << 11,
    FAULT_UNLINK = 1u << 12,
    FAULT_MKDIR = 1u << 13,
    FAULT_RMDIR = 1u << 14,
    FAULT_MMAP = 1u << 15,
    FAULT_MUNMAP = 1u << 16,
    FAULT_ANY = (1u << 17) - 1
};

/* The n-th call of `mask` from now (1 = next), and `repeat` - 1 after it, fail
 * with sys_errno. A failing close or munmap still releases. n = 0: only count.
 * Installs the table; faults_sys_off takes it away. */
void faults_sys_arm(unsigned mask, uint64_t n, uint64_t repeat, int sys_errno);
void faults_sys_off(void);
uint64_t faults_sys_calls(void); /* calls of the mask since arming */
uint64_t faults_sys_fired(void); /* how many of them failed */
/* pread and pwrite transfer at most so many bytes each while armed; 0 = no
 * limit. */
void faults_sys_short(size_t max_bytes);

/* Work under a loop: returns what the code under test returned. */
typedef enum tv_err (*fault_work)(void *arg, struct tv_error *err);

/* Fails each allocation in turn: TV_E_NOMEM is expected. `may_succeed`: work
 * that can do without some allocation. Returns the number of steps. */
uint64_t faults_loop_alloc(fault_work work, void *arg, bool may_succeed);
/* Fails each call of the mask in turn with sys_errno: `want` is expected. */
uint64_t faults_loop_sys(fault_work work, void *arg, unsigned mask,
                         int sys_errno, enum tv_err want, bool may_succeed);

#endif
