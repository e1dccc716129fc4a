"""The text of a chat: Grok-1 is a base model, which continues it.

A template is in Jinja, as those of Hugging Face: it gets `messages`, each with `role` and
`content`.
"""

from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from grok1.serving.http.errors import ApiError

# "User: Hello\n\nAssistant:" for the message "Hello" of the user.
PLAIN = """\
{% for message in messages -%}
{{ message.role | capitalize }}: {{ message.content | trim }}

{% endfor -%}
Assistant:"""
STOPS = "\n\nUser:", "\n\nSystem:", "\n\nAssistant:"  # of the plain template
ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}


class Template:
    """How messages become a prompt. path: of a Jinja template; None: PLAIN.

    stops: strings that end an answer. Raises ValueError if the file is no template.
    """

    def __init__(self, path: Path | None = None):
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
        environment.globals["raise_exception"] = _refuse
        try:
            text = PLAIN if path is None else path.read_text(encoding="utf-8")
            self._template = environment.from_string(text)
        except (OSError, UnicodeDecodeError, TemplateError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(
                f"--chat-template {path}: expected a Jinja template, got an error: {reason}"
            ) from error
        self.stops = STOPS if path is None else ()

    def prompt(self, messages: object) -> str:
        """Return the prompt of the messages of a body. Raises ApiError."""
        if not isinstance(messages, list) or not messages:
            message = "messages: expected a list of at least one message"
            raise ApiError(400, message, "messages")
        checked = [_message(f"messages[{n}]", value) for n, value in enumerate(messages)]
        try:
            return self._template.render(messages=checked, add_generation_prompt=True)
        except Exception as error:  # whatever the template does with them
            message = f"messages: the chat template refuses them: {error}"
            raise ApiError(400, message, "messages") from error


def _refuse(reason: object) -> None:
    """Raise an error in a template, as those of Hugging Face do."""
    raise TemplateError(str(reason))


def _message(place: str, value: Any) -> dict[str, str]:
    """Return a message as role and text. Raises ApiError."""
    if not isinstance(value, dict):
        raise ApiError(400, f"{place}: expected an object with role and content", "messages")
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or role not in ROLES:
        message = f"{place}.role: expected one of {', '.join(ROLES)}, got {str(role)[:40]!r}"
        raise ApiError(400, message, "messages")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        message = f"{place}.content: expected a string, or a list of parts of the type text"
        raise ApiError(400, message, "messages")
    return {"role": ROLES[role], "content": content}
