/* SPDX-License-Identifier: Apache-2.0 */
/*
 * version.c - --version: the tool, the libraries in it, what the CPU gives.
 *
 * TVC_LIB_* come from pkg-config at build time (cli/CMakeLists.txt).
 */
#include "cli.h"

#include <string.h>

#include <jansson.h>

static const struct {
    const char *name, *version;
} libraries[] = {
    {"LMDB", TVC_LIB_LMDB},         {"CRoaring", TVC_LIB_ROARING},
    {"xxHash", TVC_LIB_XXHASH},     {"jansson", TVC_LIB_JANSSON},
    {"libyaml", TVC_LIB_YAML},      {"minizip", TVC_LIB_MINIZIP},
    {"PCRE2", TVC_LIB_PCRE2},       {"utf8proc", TVC_LIB_UTF8PROC},
    {"OpenBLAS", TVC_LIB_OPENBLAS}, {"oneDNN", TVC_LIB_ONEDNN},
};
#define N_LIBRARIES (sizeof libraries / sizeof *libraries)

static const char *version_of(size_t i)
{
    /* Jansson is the one whose loaded version can be asked. */
    if (strcmp(libraries[i].name, "jansson") == 0)
        return jansson_version_str();
    return *libraries[i].version ? libraries[i].version : "not built";
}

void tvc_version(struct tvc *c)
{
    char features[256];
    char cuda[320];
    tvk_cpu_features(features, sizeof features);
    (void)tvk_cuda_describe(c->device_index, cuda, sizeof cuda);
    if (c->out.json) {
        json_t *libs = json_object();
        for (size_t i = 0; i < N_LIBRARIES; i++)
            (void)json_object_set_new(libs, libraries[i].name,
                                      json_string(version_of(i)));
        char schema[64];
        (void)snprintf(schema, sizeof schema, "%s.version/1", c->tool->name);
        tvc_out_json(&c->out,
                     json_pack("{s:s, s:s, s:o, s:s, s:s, s:s}", "schema",
                               schema, "version", TVC_VERSION, "libraries",
                               libs, "cpu_features", features, "kernels",
                               c->kernels->name, "cuda", cuda));
        return;
    }
    tvc_out(&c->out, "%s %s\n", c->tool->name, TVC_VERSION);
    tvc_out(&c->out, "libraries:");
    for (size_t i = 0; i < N_LIBRARIES; i++)
        tvc_out(&c->out, "%s %s %s", i ? "," : "", libraries[i].name,
                version_of(i));
    tvc_out(&c->out, "\nCPU features: %s (kernels: %s)\n", features,
            c->kernels->name);
    tvc_out(&c->out, "CUDA: %s\n", cuda);
}
