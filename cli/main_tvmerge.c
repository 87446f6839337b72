/* SPDX-License-Identifier: Apache-2.0 */
/*
 * main_tvmerge.c - the command table of tvmerge: what is made of the store.
 */
#include "tvmerge.h"

#include <string.h>
#include <sys/stat.h>

#include "tv/sys.h"

static const struct tvc_command *const commands[] = {
    &tvc_cmd_run,     &tvc_cmd_plan,    &tvc_cmd_status,
    &tvc_cmd_methods, &tvc_cmd_extract, &tvc_cmd_layers,
#ifdef TVC_HAVE_EVAL
    &tvc_cmd_compare,
#endif
};

/* A recipe: a file that is there, or the name of one that is missing. */
static bool is_recipe(const char *arg)
{
    static const char *const suffixes[] = {".yml", ".yaml", ".json"};
    const size_t n = strlen(arg);
    for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++) {
        const size_t m = strlen(suffixes[i]);
        if (n > m && strcmp(arg + n - m, suffixes[i]) == 0)
            return true;
    }
    struct stat st;
    return tv_sys()->stat(arg, &st) == 0 && S_ISREG(st.st_mode);
}

static const struct tvc_tool tool = {
    .name = "tvmerge",
    .summary = "Merges language models and adapters by recipe, in bounded "
               "memory.",
    .commands = commands,
    .n_commands = sizeof commands / sizeof *commands,
    .short_form = &tvc_cmd_run,
    .is_short = is_recipe,
    .short_usage = "RECIPE OUT [OPTION...]",
    .examples = "tvmerge recipe.yml ./merged\n"
                "tvmerge plan recipe.yml\n"
                "tvmerge run recipe.yml --into merged --store models.tv\n"
                "tvmerge status ./merged\n"
                "tvmerge compare recipe.yml -o ./cmp --text prose.txt\n"
                "tvmerge methods ties",
};

int main(int argc, char **argv)
{
    return tvc_main(&tool, argc, argv);
}
