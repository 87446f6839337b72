/* SPDX-License-Identifier: Apache-2.0 */
/*
 * eval_options.c - see eval_options.h.
 */
#include <errno.h>

#include "eval_options.h"

#include <string.h>

#include "tveval.h"

void tvc_eval_init(struct tvc_eval_opts *o)
{
    *o = (struct tvc_eval_opts){.ppl = {.bos = -2}};
}

error_t tvc_parse_count(struct tvc *c, const char *option, const char *arg,
                        size_t *out)
{
    uint64_t n = 0;
    const error_t e = tvc_parse_u64(c, option, arg, INT32_MAX, &n);

    if (e == 0 && n == 0)
        return tvc_bad(c, "%s must be positive", option);
    if (e == 0)
        *out = (size_t)n;
    return e;
}

static error_t protocol(struct tvc *c, const char *arg, enum tve_protocol *p)
{
    const char *names[TVE_PROTOCOL_COUNT];

    for (int i = 0; i < TVE_PROTOCOL_COUNT; i++)
        names[i] = tve_protocol_name((enum tve_protocol)i);
    const int i = tvc_choose(c, "--protocol", arg, names, TVE_PROTOCOL_COUNT);
    if (i < 0)
        return EINVAL;
    *p = (enum tve_protocol)i;
    return 0;
}

error_t tvc_eval_option(struct tvc *c, int key, const char *arg,
                        struct tvc_eval_opts *o)
{
    switch (key) {
    case TVC_KEY_PROTOCOL:
        return protocol(c, arg, &o->ppl.protocol);
    case TVC_KEY_CONTEXT:
        return tvc_parse_count(c, "--context", arg, &o->ppl.context);
    case TVC_KEY_STRIDE:
        return tvc_parse_count(c, "--stride", arg, &o->ppl.stride);
    case TVC_KEY_TOKENIZER:
        o->tokenizer = arg;
        return 0;
    case TVC_KEY_BOS:
        return tvc_parse_bos(c, arg, &o->ppl.bos);
    default:
        return ARGP_ERR_UNKNOWN;
    }
}
