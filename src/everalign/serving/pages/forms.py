"""Forms as browsers send them: read within limits, and only from this gateway's own pages."""

from urllib.parse import parse_qsl

from fastapi import Request

from everalign.serving.errors import GatewayError, refused
from everalign.serving.json_size import aside
from everalign.serving.limits import BODY_SECONDS, FORM, read_body
from everalign.serving.sessions import Sessions

_MOST_FIELDS = 40


async def read_form(request: Request, sessions: Sessions, most: int, seconds: float = BODY_SECONDS) -> dict[str, str]:
    """Return a form's fields.

    Args:
        request: whose body has not been read.
        sessions: that its token must be of.
        most: bytes.
        seconds: within which it has to be there.

    Raises:
        GatewayError: it cannot be read, or it comes from elsewhere or from a session that is over (403).
    """
    content = await read_body(request, most, FORM, seconds)
    fields = await aside(content, lambda: parsed(content))
    session = request.state.session
    own = session is not None and session.key_id == request.state.key_id
    if not own or not sessions.is_token(session, fields.get("token", "")):
        message = "this form is too old, or is not from here; nothing was done: please send it again"
        raise GatewayError(403, message, "invalid_request_error", "form_expired")
    return fields


def parsed(content: bytes) -> dict[str, str]:
    """Return the fields of a form's body, ends of lines as one sign; raises GatewayError."""
    try:
        found = parse_qsl(content.decode(), keep_blank_values=True, errors="strict", max_num_fields=_MOST_FIELDS)
    except ValueError:
        raise refused("the form cannot be read", code="invalid_form") from None
    return {name: value.replace("\r\n", "\n") for name, value in found}
