/* SPDX-License-Identifier: Apache-2.0 */
/*
 * chat.c - the plain chat formats as Jinja: every message between its marks,
 * nothing else (no default system prompt, no tools). Written from the formats'
 * descriptions.
 */
#include "chat.h"

#include <string.h>

const char *const tvm_chat_templates[TVM_CHAT_TEMPLATES] = {
    "alpaca", "chatml", "exaone", "llama3", "mistral"};

static const struct tvm_chat templates[TVM_CHAT_TEMPLATES] = {
    {"{%- for m in messages -%}\n"
     "{%- if m.role == 'system' -%}\n"
     "{{ m.content + '\\n\\n' }}\n"
     "{%- elif m.role == 'user' -%}\n"
     "{{ '### Instruction:\\n' + m.content + '\\n\\n' }}\n"
     "{%- else -%}\n"
     "{{ '### Response:\\n' + m.content + eos_token + '\\n\\n' }}\n"
     "{%- endif -%}\n"
     "{%- endfor -%}\n"
     "{%- if add_generation_prompt -%}\n"
     "{{ '### Response:\\n' }}\n"
     "{%- endif -%}\n",
     {NULL}},
    {"{%- for m in messages -%}\n"
     "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}\n"
     "{%- endfor -%}\n"
     "{%- if add_generation_prompt -%}\n"
     "{{ '<|im_start|>assistant\\n' }}\n"
     "{%- endif -%}\n",
     {"<|im_start|>", "<|im_end|>"}},
    {"{%- for m in messages -%}\n"
     "{%- if m.role == 'user' -%}\n"
     "{{ '[|user|]' + m.content + '\\n' }}\n"
     "{%- else -%}\n"
     "{{ '[|' + m.role + '|]' + m.content + '[|endofturn|]\\n' }}\n"
     "{%- endif -%}\n"
     "{%- endfor -%}\n"
     "{%- if add_generation_prompt -%}\n"
     "{{ '[|assistant|]' }}\n"
     "{%- endif -%}\n",
     {"[|user|]", "[|assistant|]", "[|endofturn|]"}},
    {"{{- bos_token -}}\n"
     "{%- for m in messages -%}\n"
     "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + "
     "m.content | trim + '<|eot_id|>' }}\n"
     "{%- endfor -%}\n"
     "{%- if add_generation_prompt -%}\n"
     "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
     "{%- endif -%}\n",
     {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}},
    {"{{- bos_token -}}\n"
     "{%- set ns = namespace(system='') -%}\n"
     "{%- for m in messages -%}\n"
     "{%- if m.role == 'system' -%}\n"
     "{%- set ns.system = m.content + '\\n\\n' -%}\n"
     "{%- elif m.role == 'user' -%}\n"
     "{{ '[INST] ' + ns.system + m.content + ' [/INST]' }}\n"
     "{%- set ns.system = '' -%}\n"
     "{%- else -%}\n"
     "{{ ' ' + m.content + eos_token }}\n"
     "{%- endif -%}\n"
     "{%- endfor -%}\n",
     {NULL}},
};

const struct tvm_chat *tvm_chat_template(const char *name)
{
    for (size_t i = 0; i < TVM_CHAT_TEMPLATES; i++) {
        if (strcmp(tvm_chat_templates[i], name) == 0)
            return &templates[i];
    }
    return NULL;
}
