"""Conversations into prompts: where templates come from, what they may do, what they may not."""

import re
from datetime import datetime

import pytest

from pagedcore.errors import ConfigError, ModelError, RequestError
from pagedcore.text import chat_template
from pagedcore.text.chat_template import ChatTemplate

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [{"role": "user", "content": "hi"}]


def rendered(source, messages=TALK, **options):
    return ChatTemplate(source, {"eos_token": "</s>"}).render(messages, **options)


def test_a_conversation_becomes_a_prompt():
    assert rendered(CHATML) == "<|user|>hi</s>\n<|assistant|>"
    assert rendered(CHATML, add_generation_prompt=False) == "<|user|>hi</s>\n"


def test_blocks_leave_no_blank_lines():
    assert rendered("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"


def test_tools_and_other_options_reach_the_template():
    source = "{{ tools | tojson }} {{ enable_thinking }} {{ tools is none }}"
    assert rendered(source, tools=[{"a": "é<"}], enable_thinking=True) == (
        '[{"a": "é<"}] True False'
    )
    assert rendered("{{ tools is none and documents is none }}") == "True"
    assert rendered("{{ {'b': 1, 'a': [2]} | tojson(indent=1) }}") == (
        '{\n "b": 1,\n "a": [\n  2\n ]\n}'
    )


def test_what_hugging_face_templates_use_is_there():
    source = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert rendered(source) == "01"
    assert rendered("a{% generation %}b{% endgeneration %}c") == "abc"
    assert rendered("{{ strftime_now('%Y') }}") in {str(datetime.now().year + i) for i in (-1, 0)}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ missing.attribute.of }}", "missing"),
        ("{{ 1 / 0 }}", "zero"),
        ("{% for i in range(1000000) %}{% endfor %}", "Range too big"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
    ],
)
def test_an_error_in_a_template_is_a_request_error(source, said):
    with pytest.raises(RequestError, match=said) as caught:
        rendered(source)
    assert caught.value.param == "messages"


def test_output_without_end_is_cut_off(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_PROMPT_CHARS", 1000)
    with pytest.raises(RequestError, match="more than 1000 characters"):
        rendered("{% for i in range(9999) %}{% for j in range(9999) %}x{% endfor %}{% endfor %}")


@pytest.mark.parametrize(
    ("last", "source", "prompt"),
    [
        ("Once ", CHATML, "<|assistant|>Once "),
        (" Once ", CHATML, "<|assistant|> Once "),
        ("Once ", CHATML.replace("m.content", "m.content | trim"), "<|assistant|>Once"),
    ],
)
def test_a_last_message_can_be_gone_on_with(last, source, prompt):
    messages = [{"role": "assistant", "content": last}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert rendered(source, messages, **options) == prompt


def test_going_on_needs_a_last_text_and_no_new_message():
    with pytest.raises(RequestError, match="add_generation_prompt=false"):
        rendered(CHATML, continue_final_message=True)
    options = {"add_generation_prompt": False, "continue_final_message": True}
    with pytest.raises(RequestError, match="does not show the last message"):
        rendered("empty", **options)
    with pytest.raises(RequestError, match="does not show the last message"):
        rendered(CHATML, [{"role": "assistant", "content": " "}], **options)


def test_the_file_wins_over_the_config_and_the_override_over_both(model_folder, tmp_path):
    folder = model_folder("x.json", {})
    assert ChatTemplate.from_folder(folder) is None
    model_folder("tokenizer_config.json", {"chat_template": "config"})
    assert ChatTemplate.from_folder(folder).render(TALK) == "config"
    model_folder("chat_template.jinja", "file")
    assert ChatTemplate.from_folder(folder).render(TALK) == "file"
    given = ChatTemplate.from_folder(folder, override="{{ 'text' }}")
    assert given.render(TALK) == "text"
    (tmp_path / "mine.jinja").write_text("mine")
    given = ChatTemplate.from_folder(folder, override=str(tmp_path / "mine.jinja"))
    assert given.render(TALK) == "mine"


@pytest.mark.parametrize("where", ["config", "files"])
def test_the_tool_template_is_taken_when_there_are_tools(model_folder, where):
    if where == "config":
        named = [
            {"name": "default", "template": "plain"},
            {"name": "tool_use", "template": "tools"},
        ]
        folder = model_folder("tokenizer_config.json", {"chat_template": named})
    else:
        model_folder("chat_template.jinja", "plain")
        model_folder("additional_chat_templates/tool_use.jinja", "tools")
        folder = model_folder("x.json", {})
    template = ChatTemplate.from_folder(folder)
    assert template.render(TALK) == "plain"
    assert template.render(TALK, tools=[]) == "plain"
    assert template.render(TALK, tools=[{}]) == "tools"


def test_named_templates_without_a_default_say_their_names():
    with pytest.raises(RequestError, match="named rag, tool_use"):
        ChatTemplate({"tool_use": "", "rag": ""}).render(TALK)


def test_a_bad_template_blames_whoever_gave_it(model_folder):
    folder = model_folder("chat_template.jinja", "{% for %}")
    with pytest.raises(ModelError, match="not valid Jinja"):
        ChatTemplate.from_folder(folder)
    with pytest.raises(ConfigError, match="not valid Jinja"):
        ChatTemplate.from_folder(folder, override="{% if %}")
    with pytest.raises(ConfigError, match="a file that holds one"):
        ChatTemplate.from_folder(folder, override="no-such-file.jinja")
    with pytest.raises(RequestError, match="not valid Jinja") as caught:
        ChatTemplate("{{")
    assert caught.value.param == "chat_template"


@pytest.mark.parametrize("entries", ["plain text", [1], [{"name": "default"}]])
def test_a_malformed_list_of_templates_is_named(model_folder, entries):
    listed = entries if isinstance(entries, list) else {"default": entries}
    folder = model_folder("tokenizer_config.json", {"chat_template": listed})
    with pytest.raises(ModelError, match=re.escape("tokenizer_config.json")):
        ChatTemplate.from_folder(folder)
