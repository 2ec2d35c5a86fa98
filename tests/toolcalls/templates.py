"""Chat templates of every kind, as far as tools are concerned: small, and in the form of those that models bring."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

_SPEAKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
)
_TURN = "<|im_start|>{{ message.role }}\n{{ message.content }}"

HERMES = (
    _TOOLS
    + "{% for message in messages %}"
    + _TURN
    + "{% for call in message.tool_calls or [] %}\n<tool_call>\n"
    + '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    + "{% endfor %}<|im_end|>\n{% endfor %}"
    + _SPEAKS
)
THINKING = HERMES.replace(
    _TURN, _TURN.replace("\n{{", "\n{{ '<think>\n\n</think>\n\n' if message.role == 'assistant' and loop.last }}{{")
).replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
LLAMA = (
    _TOOLS
    + "{% for message in messages %}{% if message.tool_calls %}"
    + "{% if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    + "{% set function = message.tool_calls[0].function %}<|im_start|>assistant\n"
    + '{"name": "{{ function.name }}", "parameters": {{ function.arguments | tojson }}}<|im_end|>\n'
    + "{% else %}"
    + _TURN
    + "<|im_end|>\n{% endif %}{% endfor %}"
    + _SPEAKS
)
MISTRAL = (
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]{{ message.content }}[/INST]"
    "{% elif message.role == 'tool' %}[TOOL_RESULTS]{{ message.content }}[/TOOL_RESULTS]"
    "{% elif message.role == 'system' %}{{ raise_exception('no system messages') }}"
    "{% elif message.tool_calls %}[TOOL_CALLS] [{% for call in message.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "{{ ', ' if not loop.last }}{% endfor %}]<|im_end|>"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{% endfor %}"
)
AS_TEXT = HERMES.replace("call.function.arguments | tojson", "'' + call.function.arguments")
REPR = HERMES.replace("call.function.arguments | tojson", "call.function.arguments")
NAMELESS = HERMES.replace('"name": "{{ call.function.name }}", ', "")
PYTHONIC = (
    _TOOLS
    + "{% for message in messages %}"
    + _TURN
    + "{% if message.tool_calls %}[{% for call in message.tool_calls %}{{ call.function.name }}("
    + '{% for name, value in call.function.arguments.items() %}{{ name }}="{{ value }}"{% endfor %})'
    + "{{ ', ' if not loop.last }}{% endfor %}]{% endif %}<|im_end|>\n{% endfor %}"
    + _SPEAKS
)
XML = HERMES.replace(
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}',
    "<function={{ call.function.name }}>\n{% for name, value in call.function.arguments.items() %}"
    "<parameter={{ name }}>\n{{ value }}\n</parameter>\n{% endfor %}</function>",
)
NO_PLACE = CHAT_TEMPLATE
NO_SYSTEM = CHAT_TEMPLATE.replace(
    "{% for", "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{% for", 1
)


def tokenizer_with(template: str, *, special: tuple[str, ...] = ()) -> PreTrainedTokenizerBase:
    """A small tokenizer with a chat template and more special tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer
