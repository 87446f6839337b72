/* SPDX-License-Identifier: Apache-2.0 */
/*
 * main_tveval.c - the command table of tveval: what a model is worth.
 */
#include "tveval.h"

static const struct tvc_command *const commands[] = {
    &tvc_cmd_ppl,
    &tvc_cmd_logits,
    &tvc_cmd_tokenize,
    &tvc_cmd_calibrate,
};

static const struct tvc_tool tool = {
    .name = "tveval",
    .summary =
        "Evaluates language models: perplexity, logits, token ids, input "
        "statistics.",
    .commands = commands,
    .n_commands = sizeof commands / sizeof *commands,
    .examples = "tveval ppl ./merged --text wiki.txt\n"
                "tveval ppl ./base+./lora --text wiki.txt --json\n"
                "tveval tokenize ./merged --text wiki.txt",
};

int main(int argc, char **argv)
{
    return tvc_main(&tool, argc, argv);
}
