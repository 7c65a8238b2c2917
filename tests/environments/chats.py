"""Tiny tokenizers with the kinds of chat templates that there are."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = """
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
LLAMA3 = """
{{- bos_token -}}
{%- for message in messages -%}
<|start_header_id|>{{ 'ipython' if message.role == 'tool' else message.role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start_header_id|>assistant<|end_header_id|>

{% endif -%}
"""
# Results of tools are a user's, several in one message, as Qwen has them.
TOOLS = """
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}<|im_start|>user{%- endif %}
<tool_response>
{{ message.content }}
</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}<|im_end|>
{% endif -%}
{%- else -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
# Earlier turns lose their thinking, the last one has an empty thought of its own, as Qwen3's.
THINKING = """
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' -%}
{%- if loop.last -%}<think>

</think>

{% endif -%}
{{ message.content.split('</think>')[-1].lstrip('\n') }}
{%- else -%}{{ message.content }}{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
# No role but user and assistant, in turns; the end token directly before the next question, as Mistral's.
ALTERNATING = """
{{- bos_token -}}
{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('roles must alternate user/assistant') }}
{%- endif -%}
{%- if message.role == 'user' -%}[INST] {{ message.content }} [/INST]
{%- else -%}{{ message.content }}{{ eos_token }}{%- endif -%}
{%- endfor -%}
"""
NO_END = """
{%- for message in messages -%}
{{ message.role }}: {{ message.content }}
{% endfor -%}
{%- if add_generation_prompt -%}assistant:{%- endif -%}
"""
# The last turn ends otherwise than earlier ones, as gpt-oss's.
OTHER_END = CHATML.replace(
    "<|im_end|>", "{{ '<|eot_id|>' if loop.last and message.role == 'assistant' else '<|im_end|>' }}"
)
UPPER = CHATML.replace("message.content", "message.content | upper")
SPECIAL = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
LETTERS = [chr(i) for i in range(32, 127)] + ["\n"]


def make_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters; special tokens are 0 to 7, `<eos>` 1."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "<unk>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[3:],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = template.strip("\n") if template else None
    return made
