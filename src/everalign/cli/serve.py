"""The verb `serve`: the gateway."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everalign.cli.console import notes, say
from everalign.cli.correct_run import load_corrector, make_approver
from everalign.cli.options import TrustRemoteCode, option
from everalign.errors import InputError

if TYPE_CHECKING:
    from everalign.serving.corrector_reload import CorrectorReloader
    from everalign.serving.corrector_service import CorrectionService
    from everalign.serving.request_log import Store
    from everalign.serving.settings import GatewaySettings

EPILOG = (
    "Example: everalign serve --upstream http://127.0.0.1:8000/v1 --corrector runs/corrector "
    "--store sqlite:///feedback.db; clients' keys are read from EVERALIGN_API_KEYS, the upstream's from OPENAI_API_KEY "
    "(of one with a name from NAME_API_KEY), those of a corrector and a judge on a server from CORRECTOR_API_KEY and "
    "APPROVER_API_KEY: no server is sent another one's key"
)

_KEYLESS = "without keys whoever reaches this port is served, and uses the upstream's key; set EVERALIGN_API_KEYS"
_LOCAL = "without keys only this machine is served; set EVERALIGN_API_KEYS before you put a proxy in front"

# A server computes by itself what comes at once; the model in this process has all its cores for one batch.
_THREADS_OF_A_SERVER = 32


def serve(
    upstream: Annotated[
        list[str], option("An OpenAI-compatible server; give it again for several, with names.", "URL|NAME=URL")
    ],
    corrector: Annotated[
        str | None, option("A corrector's folder, a run that promotes them, or one on a server.", "DIR|RUN|URL#MODEL")
    ] = None,
    template: Annotated[str | None, option("What it reads, if it does not say so itself.", "ID")] = None,
    gate: Annotated[
        float | None, option("Let answers pass from this mean log-likelihood on, in nats per token.", "NATS")
    ] = None,
    approve: Annotated[
        str | None, option("Who must find a correction better than the answer.", "DIR|MODULE:FUNCTION|URL#MODEL")
    ] = None,
    margin: Annotated[float | None, option("How much better, in units of its rewards.")] = None,
    precision: Annotated[str | None, option("Of a corrector in this process: fp32 or bf16.", "PRECISION")] = None,
    device: Annotated[str | None, option("Such as cuda:0; the GPU if there is one.")] = None,
    mode: Annotated[
        str | None, option("off, shadow, correct or strict; correct if there is a corrector, else off.", "MODE")
    ] = None,
    on_failure: Annotated[
        str | None, option("Without a correction, give the answer (open) or an error (closed).", "open|closed")
    ] = None,
    on_rollback: Annotated[
        str | None,
        option(
            "While a run is rolled back to its base model: uncorrected answers, or none (stop).", "uncorrected|stop"
        ),
    ] = None,
    store: Annotated[
        str | None, option("Keeps exchanges and feedback: sqlite:///FILE or postgresql://...", "DATABASE_URL")
    ] = None,
    keep: Annotated[
        str | None, option("Which exchanges: opted-in (store: true), all (but store: false), none.", "WHICH")
    ] = None,
    redact: Annotated[
        str | None, option("Take out before keeping: all, or some of email,phone,card,key.", "KINDS")
    ] = None,
    retention_days: Annotated[int | None, option("Remove what is older; kept for ever if not given.", "DAYS")] = None,
    host: Annotated[str, typer.Option(help="Where to listen; others than this machine's need keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for any that is free.")] = 8080,
    strict_structured: Annotated[
        str | None,
        option("What strict does with JSON and tools: refuse (default), pass, correct-strings.", "HOW"),
    ] = None,
    passthrough: Annotated[
        str | None,
        option("Endpoints besides chat that are passed on as they are; all.", "all|none|NAME,NAME.."),
    ] = None,
    fallback: Annotated[
        str | None, option("Answers where the upstream is away or fails; its key is FALLBACK_API_KEY.", "URL[#MODEL]")
    ] = None,
    access_log: Annotated[
        Path | None, option("A line of JSON for each request, without what was said; - for standard error.", "FILE|-")
    ] = None,
    requests_per_minute: Annotated[int | None, option("That each key may begin; its line in --keys-file wins.")] = None,
    tokens_per_day: Annotated[int | None, option("That each key may use; its line in --keys-file wins.")] = None,
    keys_file: Annotated[
        Path | None,
        option("Further keys, one a line, each with what it may use; read again when it changes.", "FILE"),
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", metavar="", help="Without keys, serve whoever reaches the port.")
    ] = False,
    cors_origin: Annotated[
        list[str] | None, option("A site whose pages may use the API, or * for all; may be repeated.", "ORIGIN")
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None, option("Whose X-Forwarded-For and -Proto are believed; may be repeated.", "ADDRESS|NETWORK")
    ] = None,
    root_path: Annotated[str | None, option("What a proxy has in front of the gateway's paths.", "/PATH")] = None,
    forward_header: Annotated[
        list[str] | None, option("A client's header that the upstream gets too; may be repeated.", "NAME|PREFIX*")
    ] = None,
    return_header: Annotated[
        list[str] | None, option("An upstream's header that clients get too; may be repeated.", "NAME|PREFIX*")
    ] = None,
    timeout: Annotated[
        float | None, option("Seconds for an answer of the upstream, streamed or not; 600.", "SECONDS")
    ] = None,
    correction_timeout: Annotated[
        float | None, option("Seconds for a correction, waiting and all attempts included; 60.", "SECONDS")
    ] = None,
    store_timeout: Annotated[
        float | None,
        option("Seconds for the store; then an answer goes out store_failures, and says so; 5.", "SECONDS"),
    ] = None,
    keepalive: Annotated[float | None, option("Seconds of silence before a comment; 15.", "SECONDS")] = None,
    retries: Annotated[
        int | None, option("Of a request to the upstream that was not answered, for clients that do not retry; 1.")
    ] = None,
    concurrency: Annotated[
        int | None, option("Most requests under way; 1000. A key never has more than are free.")
    ] = None,
    connections_per_address: Annotated[
        int | None, option("Most connections of one client's address; 1000. Idle ones make room.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve an OpenAI-compatible gateway, which corrects the upstream's answers and collects feedback.

    Clients change their base URL, and nothing else.
    """
    _check_installed()
    from everalign.serving.headers import HeaderRules
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
    from everalign.serving.settings import Access

    keys = read_keys(os.environ)
    check_host(host, not keys and keys_file is None, no_auth)
    _check_heeded(corrector, {"template": template, "gate": gate, "approve": approve, "margin": margin})
    _check_heeded(corrector, {"strict-structured": strict_structured})
    _check_heeded(corrector, {"precision": precision, "device": device, "on-failure": on_failure})
    _check_heeded(corrector, {"on-rollback": on_rollback})
    of_store = (("keep", keep), ("redact", redact), ("retention-days", retention_days))
    for name, value in (*of_store, ("store-timeout", store_timeout)):
        if value is not None and store is None:
            raise InputError(f"--{name}: there is nothing to keep exchanges in; name it with --store sqlite:///FILE")
    given: dict[str, Any] = {"mode": mode, "on_failure": on_failure, "keep": keep, "keepalive": keepalive}
    given |= {"retries": retries, "passthrough": passthrough, "strict_structured": strict_structured}
    access = Access(
        keys_file=keys_file,
        no_auth=no_auth,
        cors_origins=tuple(cors_origin or ()),
        trusted_proxies=tuple(trusted_proxy or ()),
        root_path=root_path or "",
        allowance=Allowance(requests_per_minute, tokens_per_day),
        headers=HeaderRules(tuple(forward_header or ()), tuple(return_header or ())),
    )
    if fallback is not None:
        given["fallback"], given["fallback_model"] = read_fallback(fallback, os.environ)
    settings = _settings(
        {
            "access": access,
            "upstreams": read_upstreams(upstream, os.environ),
            "keys": keys,
            **{name: value for name, value in given.items() if value is not None},
        },
        {"total": timeout, "correction": correction_timeout, "store": store_timeout},
        {
            "concurrency": concurrency,
            "per_key": concurrency,
            "connections_per_address": connections_per_address,
        },
    )
    if settings.mode not in (None, "off") and corrector is None:
        raise InputError(f"--mode {settings.mode}: needs a corrector; name one with --corrector")
    # The port comes first: a corrector takes long to load, and a port in use is found out at once.
    with bound_socket(host, port) as listening:
        kept = _open_store(store, redact, retention_days, settings.timeouts.store)
        local = {"device": device, "precision": precision}
        approval = make_approval(approve, margin)
        corrections, reloader = _corrections(corrector, template, gate, approval, local, settings, on_rollback)
        from everalign.serving.app import create_app
        from everalign.serving.telemetry import write_access_log

        app = create_app(settings, store=kept, corrections=corrections, reloader=reloader)

        def log() -> None:
            notes.print(f"serving {address_of(listening)}, Ctrl-C ends it")
            for label, text in description(app.state.gateway, address_of(listening), corrector, store):
                say(label, text, "dim")
            if not app.state.gateway.keys.needed:
                say("warning", _KEYLESS if no_auth else _LOCAL, "yellow")

        if access_log is not None:
            write_access_log(str(access_log))
        run(app, listening, log, lambda text: say("warning", text, "yellow"))
    say("ended", "all requests are finished", "bold")


def make_approval(approve: str | None, margin: float | None) -> Any:
    """Return who approves of corrections; nothing is loaded where nobody does."""
    return None if approve is None and margin is None else make_approver(approve, margin)


def _check_installed() -> None:
    from importlib.util import find_spec

    for name in ("fastapi", "uvicorn", "prometheus_client", "jsonschema"):
        if find_spec(name) is None:
            raise InputError(f"serving needs {name}, which is not installed: pip install 'everalign[serve]'")


def _check_heeded(corrector: str | None, flags: dict[str, Any]) -> None:
    for name, value in flags.items():
        if corrector is None and value is not None:
            raise InputError(f"--{name}: is for a corrector; name one with --corrector, or leave it out")


def _settings(
    given: dict[str, Any], seconds: dict[str, float | None], numbers: dict[str, int | None]
) -> "GatewaySettings":
    from everalign.serving.settings import GatewaySettings, Limits, Timeouts

    timeouts = Timeouts(**{name: value for name, value in seconds.items() if value is not None})
    limits = Limits(**{name: value for name, value in numbers.items() if value is not None})
    return GatewaySettings(timeouts=timeouts, limits=limits, **given)


def _open_store(url: str | None, redact: str | None, retention_days: int | None, wait: float) -> "Store | None":
    if url is None:
        return None
    from everalign.serving.store.database import FeedbackStore
    from everalign.serving.store.redaction import KINDS, Redaction

    kinds = KINDS if redact == "all" else tuple(kind.strip() for kind in (redact or "").split(","))
    redaction = None if redact is None else Redaction(kinds)
    opened: Store = FeedbackStore.open(url, retention_days=retention_days, redaction=redaction, wait=wait)
    return opened


def _corrections(
    name: str | None,
    template: str | None,
    gate: float | None,
    approver: Any,
    local: dict[str, Any],
    settings: "GatewaySettings",
    on_rollback: str | None,
) -> tuple["CorrectionService | None", "CorrectorReloader | None"]:
    """Return the corrector in service, None for feedback alone; and the run that its versions come from, if any."""
    if name is None:
        return None, None
    from everalign.correction import CorrectionOptions
    from everalign.serving.corrector_reload import CorrectorReloader, is_run
    from everalign.serving.gateway import make_corrections

    on_server = name.startswith(("http://", "https://"))
    if on_server and gate is not None:
        raise InputError("--gate: a server does not say how likely an answer is; leave it out, or load the model")
    load = partial(load_corrector, template=template, local=local, approver=approver, options=CorrectionOptions(gate))
    if not is_run(name):
        if on_rollback is not None:
            raise InputError(f"--on-rollback: is for a run, which can be rolled back, and {name} is none; leave it out")
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
