"""The verb `serve`: the gateway."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everalign.cli.console import notes, say
from everalign.cli.correct_run import load_corrector, make_approver
from everalign.cli.options import (
    Approve,
    Device,
    Gate,
    LocalPrecision,
    Margin,
    Template,
    TrustRemoteCode,
    flags,
    option,
    require,
)
from everalign.errors import InputError
from everalign.serving.settings import Access, GatewaySettings, Limits, Timeouts

if TYPE_CHECKING:
    from everalign.serving.corrector_reload import CorrectorReloader
    from everalign.serving.corrector_service import CorrectionService
    from everalign.serving.store import FeedbackStore

_KEYLESS = "without keys every client of this port is served with the upstream's key; set EVERALIGN_API_KEYS"
_LOCAL = "without keys only this machine is served; set EVERALIGN_API_KEYS before you put a proxy in front"

# A server computes by itself what comes at once; the model in this process has all its cores for one batch.
_THREADS_OF_A_SERVER = 32


@flags(
    GatewaySettings,
    Limits,
    Access,
    Timeouts,
    only=(
        *("mode", "on_failure", "keep", "retries", "keepalive", "passthrough", "strict_structured", "stream_by"),
        *("concurrency", "connections_per_address", "keys_file", "root_path", "total", "correction"),
    ),
    names={"total": "--timeout", "correction": "--correction-timeout"},
)
def serve(
    upstream: Annotated[list[str], option("An OpenAI-compatible server; may be repeated, with names.", "URL|NAME=URL")],
    corrector: Annotated[
        str | None,
        option(
            "A corrector's folder, a run that promotes them, or one on a server.", "DIR|RUN|URL#MODEL", default="none"
        ),
    ] = None,
    template: Template = None,
    gate: Gate = None,
    approve: Approve = None,
    margin: Margin = None,
    precision: LocalPrecision = None,
    device: Device = None,
    on_rollback: Annotated[
        str | None,
        option(
            "While a run is rolled back to its base model: uncorrected answers, or errors.",
            "uncorrected|stop",
            default="uncorrected",
        ),
    ] = None,
    store: Annotated[
        str | None,
        option(
            "Database for exchanges and feedback: sqlite:///FILE or postgresql://...", "DATABASE_URL", default="none"
        ),
    ] = None,
    redact: Annotated[
        str | None,
        option("What to remove before storing: all, or some of email,phone,card,key.", "KINDS", default="nothing"),
    ] = None,
    retention_days: Annotated[int | None, option("Delete older exchanges; none by default.", "DAYS")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but a loopback address needs keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for any free one.")] = 8080,
    fallback: Annotated[
        str | None,
        option("Answers when the upstream fails; its key is FALLBACK_API_KEY.", "URL[#MODEL]", default="none"),
    ] = None,
    access_log: Annotated[
        Path | None,
        option(
            "One line of JSON for each request, without its contents; - for standard error.", "FILE|-", default="none"
        ),
    ] = None,
    requests_per_minute: Annotated[
        int | None, option("Limit of each key; a limit in --keys-file wins.", default="none")
    ] = None,
    tokens_per_day: Annotated[
        int | None, option("Limit of each key; a limit in --keys-file wins.", default="none")
    ] = None,
    no_auth: Annotated[bool, option("Serve everybody, without keys.", "", "--no-auth")] = False,
    cors_origin: Annotated[
        list[str] | None,
        option("A site whose pages may use the API, or * for all; may be repeated.", "ORIGIN", default="none"),
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None,
        option("A proxy whose X-Forwarded-For is trusted; may be repeated.", "ADDRESS|NETWORK", default="none"),
    ] = None,
    forward_header: Annotated[
        list[str] | None,
        option("Another client header to pass to the upstream; may be repeated.", "NAME|PREFIX*", default="none"),
    ] = None,
    return_header: Annotated[
        list[str] | None,
        option("Another upstream header to pass to clients; may be repeated.", "NAME|PREFIX*", default="none"),
    ] = None,
    store_timeout: Annotated[
        float | None,
        option("Seconds to wait for the store before an answer is sent without being stored; 5 by default.", "SECONDS"),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    **given: Any,
) -> None:
    """Serve an OpenAI-compatible gateway, which corrects the upstream's answers and collects feedback.

    Clients change their base URL, and nothing else.
    """
    require("serving", "fastapi", "uvicorn", "prometheus_client", "jsonschema")
    from everalign.serving.security import Allowance
    from everalign.serving.server import (
        address_of,
        bound_socket,
        check_host,
        description,
        read_fallback,
        read_keys,
        read_upstreams,
    )
    from everalign.serving.server import serve as run
    from everalign.serving.settings import HeaderRules

    keys = read_keys(os.environ)
    check_host(host, not keys and given["keys_file"] is None, no_auth)
    of_corrector = {"template": template, "gate": gate, "approve": approve, "margin": margin, "precision": precision}
    of_corrector |= {"device": device, "on-failure": given["on_failure"], "on-rollback": on_rollback}
    of_corrector |= {"strict-structured": given["strict_structured"], "stream-by": given["stream_by"]}
    if corrector is None:
        _refuse(of_corrector, "is for a corrector; name one with --corrector, or leave it out")
    of_store = {"keep": given["keep"], "redact": redact, "retention-days": retention_days}
    of_store["store-timeout"] = store_timeout
    if store is None:
        _refuse(of_store, "there is nothing to keep exchanges in; name it with --store sqlite:///FILE")
    found: dict[str, Any] = {}
    if fallback is not None:
        found["fallback"], found["fallback_model"] = read_fallback(fallback, os.environ)
    settings = GatewaySettings.from_flags(
        {
            **given,
            **found,
            "upstreams": read_upstreams(upstream, os.environ),
            "keys": keys,
            "timeouts": Timeouts.from_flags(
                {**given, "store": store_timeout},
                total="timeout",
                correction="correction-timeout",
                store="store-timeout",
            ),
            "limits": Limits.from_flags({**given, "per_key": given["concurrency"]}),
            "access": Access.from_flags(
                {
                    **given,
                    "no_auth": no_auth,
                    "cors_origins": tuple(cors_origin or ()),
                    "trusted_proxies": tuple(trusted_proxy or ()),
                    "allowance": Allowance(requests_per_minute, tokens_per_day),
                    "headers": HeaderRules(tuple(forward_header or ()), tuple(return_header or ())),
                }
            ),
        }
    )
    if approve is not None and settings.stream_by == "sentence":
        raise InputError(
            "--approve: judges whole answers, and --stream-by sentence sends their beginnings before; leave one of the "
            "two out",
            field="approve",
        )
    if settings.mode not in (None, "off") and corrector is None:
        raise InputError(f"--mode {settings.mode}: needs a corrector; name one with --corrector")
    # The port comes first: a corrector takes long to load, and a port in use is found out at once.
    with bound_socket(host, port) as listening:
        opened = _open_store(store, redact, retention_days, settings.timeouts.store)
        local = {"device": device, "precision": precision}
        approver = make_approver(approve, margin)
        corrections, reloader = _corrections(corrector, template, gate, approver, local, settings, on_rollback)
        from everalign.serving.app import create_app
        from everalign.serving.telemetry import write_access_log

        app = create_app(settings, store=opened, corrections=corrections, reloader=reloader)

        def log() -> None:
            notes.print(f"serving {address_of(listening)}, press Ctrl-C to stop")
            for label, text in description(app.state.gateway, address_of(listening), corrector, store):
                say(label, text, "dim")
            if not app.state.gateway.keys.needed:
                say("warning", _KEYLESS if no_auth else _LOCAL, "yellow")

        if access_log is not None:
            write_access_log(str(access_log))
        run(app, listening, log, lambda text: say("warning", text, "yellow"))
    say("ended", "all requests are finished", "bold")


def _refuse(flags: dict[str, Any], why: str) -> None:
    for name, value in flags.items():
        if value is not None:
            raise InputError(f"--{name}: {why}", field=name)


def _open_store(url: str | None, redact: str | None, retention_days: int | None, wait: float) -> "FeedbackStore | None":
    if url is None:
        return None
    from everalign.serving.store import FeedbackStore
    from everalign.serving.store.records import KINDS, Redaction

    kinds = KINDS if redact == "all" else tuple(kind.strip() for kind in (redact or "").split(","))
    redaction = None if redact is None else Redaction(kinds)
    return FeedbackStore.open(url, retention_days=retention_days, redaction=redaction, wait=wait)


def _corrections(
    name: str | None,
    template: str | None,
    gate: float | None,
    approver: Any,
    local: dict[str, Any],
    settings: "GatewaySettings",
    on_rollback: str | None,
) -> tuple["CorrectionService | None", "CorrectorReloader | None"]:
    """Loads the corrector to serve, None for feedback alone; and the reloader of a run's versions, if it is a run."""
    if name is None:
        return None, None
    from everalign.correction import CorrectionOptions
    from everalign.serving.corrector_reload import CorrectorReloader
    from everalign.serving.gateway import make_corrections

    on_server = name.startswith(("http://", "https://"))
    if on_server and gate is not None:
        raise InputError("--gate: a server does not say how likely an answer is; leave it out, or load the model")
    load = partial(load_corrector, template=template, local=local, approver=approver, options=CorrectionOptions(gate))
    if not (Path(name) / "run.json").is_file():
        if on_rollback is not None:
            raise InputError(f"--on-rollback: only a run can be rolled back, and {name} is not a run; leave it out")
        corrector = load(name)
        threads = _THREADS_OF_A_SERVER if on_server else 1
        return make_corrections(settings, corrector, corrector.fingerprint[:12], threads), None
    chosen: Any = on_rollback or "uncorrected"
    reloader = CorrectorReloader(Path(name), lambda folder: load(str(folder)), chosen, log=notes.print)
    if reloader.is_rolled_back:
        service = make_corrections(settings, None, "")
        reloader.withdraw(service)
        return service, reloader
    return make_corrections(settings, *reloader.load()), reloader
