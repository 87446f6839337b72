/* SPDX-License-Identifier: Apache-2.0 */
/*
 * chat.h - chat templates that recipes call by name (private to merge/).
 */
#ifndef TVM_CHAT_H
#define TVM_CHAT_H

#include <stddef.h>

#define TVM_CHAT_TEMPLATES 5u
extern const char *const tvm_chat_templates[TVM_CHAT_TEMPLATES]; /* names */

struct tvm_chat {
    const char *jinja;
    const char *tokens[4]; /* that it writes; NULL: no more */
};
/* NULL: there is no template of this name. */
const struct tvm_chat *tvm_chat_template(const char *name);

#endif
