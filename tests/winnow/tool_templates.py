"""Chat templates that know tools, in the manner of well-known families."""

from winnow.chat_template import ChatTemplate

_TURN = "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
# Lists tools in the system message, writes calls and results into tags, hides earlier reasoning.
HERMES = (
    """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- 'Functions:\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' ~ (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools>\\nCall with <tool_call></tool_call>.<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        """
    + _TURN
    + """
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.reasoning_content is string and loop.last %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for tool_call in message.tool_calls %}
            {%- if (loop.first and message.content) or not loop.first %}{{- '\\n' }}{%- endif %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
            {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
)
# Puts tools into the first user's message; one call in a message; "parameters".
LLAMA = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = '' %}{%- endif %}
{{- '<|system|>' }}{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- system_message + '<|end|>' }}
{%- if not tools is none %}
    {%- set first = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
    {{- '<|user|>Answer with a call, {"name": ..., "parameters": ...}.\\n\\n' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}
    {{- first + '<|end|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception('This model takes one call at a time!') }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|assistant|>{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- '}<|end|>' }}
    {%- else %}
        {{- '<|ipython|>' }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""
_MISTRAL = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {{- '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- set turns = messages | rejectattr('role', 'equalto', 'tool') | list %}
{%- set ns = namespace(index=0) %}
{%- for message in turns %}
    {%- if not message.get('tool_calls') %}
        {%- if (message.role == 'user') != (ns.index % 2 == 0) %}
            {{- raise_exception('roles must alternate') }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{%- set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools is not none and message == last %}
            {{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.tool_calls is defined %}
        CALLS
    {%- elif message.role == 'assistant' %}
        {{- message.content + eos_token }}
    {%- elif message.role == 'tool' %}
        {%- if message.tool_call_id | length != 9 %}
            {{- raise_exception('Tool call IDs should be nine letters and digits') }}
        {%- endif %}
        {{- '[TOOL_RESULTS]{"content": ' + message.content | string + ', "call_id": "' }}
        {{- message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}
"""
# Strict about turns and ids; a list of calls after a control token.
MISTRAL = _MISTRAL.replace(
    "CALLS",
    """{{- '[TOOL_CALLS][' }}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.id | length != 9 %}
                {{- raise_exception('Tool call IDs should be nine letters and digits') }}
            {%- endif %}
            {{- (tool_call.function | tojson)[:-1] + ', "id": "' + tool_call.id + '"}' }}
            {{- ', ' if not loop.last }}
        {%- endfor %}
        {{- ']' + eos_token }}""",
)
# The newer way: a control token, the name, another one, the arguments.
MISTRAL_NAMED = _MISTRAL.replace(
    "CALLS",
    """{%- for tool_call in message.tool_calls %}
            {{- '[TOOL_CALLS]' + tool_call.function.name + '[ARGS]' }}
            {{- tool_call.function.arguments | tojson }}
        {%- endfor %}
        {{- eos_token }}""",
)
# Lists tools and shows results, but not what was called.
NO_CALLS = (
    "{%- if tools %}{{- '<|im_start|>system\\n<tools>' }}{%- for tool in tools %}"
    "{{- (tool | string) ~ '\\n' }}{%- endfor %}"
    "{{- '</tools> Call with <tool_call></tool_call>.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}" + _TURN + "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Knows calls, with arguments as text, and results, but does not list tools.
NO_TOOLS = """\
{%- for message in messages %}
    {%- if message['tool_calls'] is defined %}
        {%- for tool in message['tool_calls'] %}
            {{- '<call>' + tool['function']['name'] + '<sep>' + tool['function']['arguments'] }}
        {%- endfor %}
    {%- elif message['role'] == 'tool' %}{{- '<output>' + message['content'] + '</output>' }}
    {%- else %}{{- '<' + message['role'] + '>' + message['content'] }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant><think>\\n' }}{%- endif %}
"""
# A form of calls that is not JSON.
TAGS = """\
{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- for call in message.tool_calls %}
        {{- '<tool_call>\\n<function=' + call.function.name + '>' }}
        {%- for key, value in call.function.arguments | items %}
            {{- '<parameter=' + key + '>' + value + '</parameter>' }}
        {%- endfor %}
        {{- '</function>\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
"""
# gpt-oss: channels, tools as types, one call in a message, and one text before it; what was
# reasoned before an answer is left out.
HARMONY = """\
{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') }}
{{- '\\n# Valid channels: analysis, commentary, final.<|end|>' }}
{%- set instructions = '' %}
{%- if messages[0].role == 'system' %}
    {%- set instructions = messages[0].content %}{%- set messages = messages[1:] %}
{%- endif %}
{%- if instructions or tools %}
    {{- '<|start|>developer<|message|>' + instructions }}
    {%- if tools %}
        {{- '\\n# Tools\\n\\nnamespace functions {\\n' }}
        {%- for tool in tools %}
            {%- set tool = tool.function %}
            {{- '// ' + tool.description + '\\ntype ' + tool.name + ' = (_: ' }}
            {{- (tool.parameters or {}) | tojson }}{{- ') => any;\\n' }}
        {%- endfor %}
        {{- '}' }}
    {%- endif %}
    {{- '<|end|>' }}
{%- endif %}
{%- set called = namespace(name=none) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
    {%- elif message.role == 'tool' %}
        {%- if called.name is none %}{{- raise_exception('no call before the result') }}{%- endif %}
        {{- '<|start|>functions.' + called.name + ' to=assistant<|channel|>commentary<|message|>' }}
        {{- message.content | tojson + '<|end|>' }}
    {%- elif 'tool_calls' in message %}
        {%- set answered = namespace(found=false) %}
        {%- for later in messages[loop.index:] %}
            {%- if later.role == 'assistant' and 'tool_calls' not in later %}
                {%- set answered.found = true %}
            {%- endif %}
        {%- endfor %}
        {%- if message.content and message.thinking %}
            {{- raise_exception('give content or thinking before a call, not both') }}
        {%- endif %}
        {%- set said = message.content or message.thinking %}
        {%- if said and not answered.found %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + said + '<|end|>' }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json' }}
        {{- '<|message|>' + call.arguments | tojson + '<|call|>' }}
        {%- set called.name = call.name %}
    {%- else %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content }}
        {{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
        {%- set called.name = none %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
"""
ALL = {
    "hermes": HERMES,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mistral_named": MISTRAL_NAMED,
    "no_calls": NO_CALLS,
    "no_tools": NO_TOOLS,
    "tags": TAGS,
    "harmony": HARMONY,
}


def template(source: str) -> ChatTemplate:
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    return ChatTemplate({"default": source}, variables, {}, allow_special_tokens=False)
