/* SPDX-License-Identifier: Apache-2.0 */
/*
 * main_tvstore.c - the command table of tvstore: what is kept.
 */
#include "tvstore.h"

static const struct tvc_command *const commands[] = {
    &tvc_cmd_init,    &tvc_cmd_import, &tvc_cmd_ls,   &tvc_cmd_info,
    &tvc_cmd_cat,     &tvc_cmd_export, &tvc_cmd_diff, &tvc_cmd_stat,
    &tvc_cmd_quota,   &tvc_cmd_mask,   &tvc_cmd_rm,   &tvc_cmd_gc,
    &tvc_cmd_compact, &tvc_cmd_verify,
};

static const struct tvc_tool tool = {
    .name = "tvstore",
    .summary = "Keeps models, adapters and merges in one memory-mapped store.",
    .commands = commands,
    .n_commands = sizeof commands / sizeof *commands,
    .examples = "tvstore init models.tv --quota 50GB\n"
                "tvstore import models.tv base ./Llama-3.2-1B\n"
                "tvstore ls models.tv\n"
                "tvstore export models.tv base ./copy",
};

int main(int argc, char **argv)
{
    return tvc_main(&tool, argc, argv);
}
