"""Chat templates in the manner of well-known families, each with what is peculiar to it."""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Splits the assistant's reasoning off its content; looks from the end; `enable_thinking`.
THINKING = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == 'user' and ns.last_query_index == messages|length - 1 %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n') %}
            {%- set reasoning_content = reasoning_content.split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.last or (loop.index0 > ns.last_query_index and reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') +
                '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
# Trims content, says which day it is, takes the system message off the list.
DATED = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|im_start|>system\\n\\nToday: " + date_string + "\\n" + system_message + "<|im_end|>" }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + "\\n\\n"+ message['content'] | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{%- endif %}
"""
# No system role, roles that alternate, another name for the assistant, its words marked.
ALTERNATING = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}
{% set role = message['role'] %}{% endif %}
{{ '<|im_start|>' ~ role ~ '\\n' }}{% generation %}{{ message['content'] | trim }}
{% endgeneration %}{{ '<|im_end|>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}
"""
# Content is a list of parts and nothing else.
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {% for p in m['content'] %}"
    "{{ p['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
# A macro for content of either kind, formatting, filters, text that is set aside first.
MACROS = """\
{%- macro shown(content) -%}
    {%- if content is string -%}{{- content -}}
    {%- else -%}{{- content | map(attribute='text') | join('') -}}{%- endif -%}
{%- endmacro -%}
{%- for m in messages -%}
    {%- set text -%}{{- shown(m.content) -}}{%- endset -%}
    {{- '<|im_start|>%s\\n{}<|im_end|>\\n' | format(m.role) | replace('{}', '') -}}
    {{- '{}|{}'.format(m.role | upper, text) | indent(2) -}}
    {{- {'said': text} | tojson -}}
    {{- ['<|im_end|>', '\\n'] | join -}}
    {%- if loop.last %}{% break %}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant\\n{%- endif -%}
"""
ALL = {
    "chatml": CHATML,
    "thinking": THINKING,
    "dated": DATED,
    "alternating": ALTERNATING,
    "parts": PARTS,
    "macros": MACROS,
}
