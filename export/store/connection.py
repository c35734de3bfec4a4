"""One request to a registry: its login, its limits, and what its answers mean in our words.

Built on oras-py's `Registry.do_request` (tokens, docker's credential helpers) without its decorator that repeats and
sleeps, on a session of `requests` that never waits for ever and never speaks plainly to a stranger.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from export.store.credentials import api_host, docker_config, read_credentials
from export.store.reference import is_loopback
from nano.errors import BrokenTransferError, NotFoundError, RequestError, WorkError, require_module

if TYPE_CHECKING:
    from requests import Response

CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
LONGEST_WAIT = 120.0
"""Seconds; a registry that asks for more is told of instead."""
_BUSY = (408, 429, 500, 502, 503, 504)


def connect(host: str, name: str, *, plain_http: bool, tls: bool = False) -> Any:
    """A client of oras-py that is logged in as far as docker's config allows.

    Args:
        host: the registry, as in a reference.
        name: the repository, for its credentials.
        plain_http: whether anyone but this machine itself may be spoken to without encryption.
        tls: speak TLS in any case.

    Raises:
        MissingExtraError: oras is not installed.
        RequestError: no registry answers there, or it wants a login that docker's config does not have.
        BrokenTransferError: it could not be reached.
    """
    provider = require_module("oras.provider", "oci")
    require_module("oras.logger", "oci").setup_logger(quiet=True)
    host = api_host(host)
    client = _client_class(provider)(hostname=host, insecure=(plain_http or is_loopback(host)) and not tls)
    _mount(client.session, plain_http)
    with send(client, "GET", f"{client.prefix}://{host}/v2/", ok=(200, 400, 401), authenticate=False) as response:
        challenge = response.headers.get("Www-Authenticate", "") if response.status_code == 401 else ""
        if response.status_code == 400:  # what Go's servers say to plain HTTP where they speak TLS
            if client.prefix == "https":
                raise RequestError("This is not a registry.", found=f"status 400 from https://{host}/v2/")
            return connect(host, name, plain_http=plain_http, tls=True)
    _log_in(client, provider, host, name, challenge)
    return client


def _client_class(provider: Any) -> Any:
    """oras-py's client, each request made once; repeating is decided where it is known what may be repeated."""

    class Client(provider.Registry):  # type: ignore[misc]
        def do_request(self, url: str, method: str = "GET", **rest: Any) -> Any:
            once = provider.Registry.do_request.__wrapped__
            response = once(self, url, method, **rest)
            if response.status_code == 401 and getattr(self.auth, "token", None):  # expired, or for less than this
                self.auth.token = None
                response.close()
                response = once(self, url, method, **rest)
            return response

    return Client


def _mount(session: Any, plain_http: bool) -> None:
    """Time limits, no plain HTTP to strangers (wherever a redirect or a login leads), no cookies, no netrc."""
    from requests.adapters import HTTPAdapter

    class Adapter(HTTPAdapter):  # type: ignore[misc]
        def send(self, request: Any, **rest: Any) -> Any:
            parts = urlsplit(request.url)
            if parts.scheme == "http" and not plain_http and not is_loopback(parts.netloc.rpartition("@")[2]):
                raise RequestError(
                    "Plain HTTP is used with this machine alone.",
                    found=f"an address http://{parts.netloc}",
                    expected="https",
                    todo="give --plain-http if the network in between is yours",
                )
            rest["timeout"] = rest.get("timeout") or (CONNECT_SECONDS, READ_SECONDS)
            return super().send(request, **rest)

    for scheme in ("http://", "https://"):
        session.mount(scheme, Adapter(pool_connections=8, pool_maxsize=8))
    session.headers["Accept-Encoding"] = "identity"
    session.headers["User-Agent"] = "nanokit"
    session.auth = _as_it_is


def _as_it_is(request: Any) -> Any:
    """Authorization stays what oras-py made it; without this `requests` would put ~/.netrc's in its place."""
    return request


def _log_in(client: Any, provider: Any, host: str, name: str, challenge: str) -> None:
    """Credentials from docker's config, for the scheme that the registry asks for."""
    if not challenge:
        return
    if challenge.partition(" ")[0].lower() == "basic":  # which oras-py's token scheme would take to another host
        client.auth = provider.oras.auth.get_auth_backend("basic", client.session, client.prefix == "http")
    client.auth._auth_config = read_credentials()
    client.auth.load_configs(client.get_container(f"{host}/{name}"))
    if isinstance(client.auth, provider.oras.auth.BasicAuth):
        if not getattr(client.auth, "_basic_auth", None):
            raise _login_wanted(host, "no login for it")
        header = client.auth.get_auth_header()

        def authorise(request: Any) -> Any:
            if urlsplit(request.url).netloc == host:
                request.headers.update(header)
            return request

        client.session.auth = authorise


def send(
    client: Any,
    method: str,
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    data: Any = None,
    ok: tuple[int, ...] = (200, 201, 202, 204, 206),
    authenticate: bool = True,
) -> Response:
    """One request; the body of its answer is not read yet.

    Raises:
        BrokenTransferError: worth another attempt: the connection broke, or the registry is busy.
        NotFoundError: status 404.
        RequestError: a login is wanted, or the certificate is not trusted.
        WorkError: any other answer.
    """
    from requests import exceptions

    headers = dict(headers or {})
    try:
        if authenticate:
            response: Response = client.do_request(url, method, data=data, headers=headers, stream=True)
        else:
            response = client.session.request(method, url, headers=headers, stream=True)
    except exceptions.SSLError as error:
        raise RequestError(
            "The registry's certificate is not trusted.", found=_first_line(error),
            todo="set REQUESTS_CA_BUNDLE to your company's certificates",
        ) from None  # fmt: skip
    except (exceptions.ConnectionError, exceptions.Timeout, exceptions.ChunkedEncodingError) as error:
        raise BrokenTransferError(
            "The registry cannot be reached.", found=f"{urlsplit(url).netloc}: {_first_line(error)}", todo="check the address and the network, and run the same command again"  # noqa: E501
        ) from None  # fmt: skip
    except exceptions.RequestException as error:
        raise RequestError("The registry's address is not usable.", found=f"{url}: {_first_line(error)}") from None
    except ValueError:
        raise _login_wanted(urlsplit(url).netloc, "it did not take what docker's config has, or that is nothing") from None  # noqa: E501  # fmt: skip
    if response.status_code not in ok:
        with response:
            raise _refusal(response, url)
    return response


def _refusal(response: Response, url: str) -> Exception:
    """What a status other than the hoped-for means."""
    status, host = response.status_code, urlsplit(url).netloc
    said = f"status {status} from {host}{_errors(response)}"
    if status in _BUSY:
        wait = _retry_after(response)
        if wait > LONGEST_WAIT:
            return WorkError("The registry asks to come back much later.", found=f"{said}, Retry-After {wait:.0f} s", todo="run the same command then: it goes on where it stopped")  # noqa: E501  # fmt: skip
        return BrokenTransferError("The registry is busy.", found=said, todo="run the same command again later", wait=wait)  # noqa: E501  # fmt: skip
    if status in (401, 403):
        return _login_wanted(host, said)
    if status in (404, 416):
        return NotFoundError("The registry has no such thing.", found=f"{said}: {urlsplit(url).path}")
    return WorkError("The registry refused.", found=said)


def _errors(response: Response) -> str:
    """The first of the errors in a registry's answer (distribution-spec, "Error Codes")."""
    try:
        first = json.loads(response.raw.read(4096, decode_content=True))["errors"][0]
        return f" ({first['code']}: {str(first.get('message', ''))[:120]})"
    except Exception:  # an answer that explains nothing is no reason to hide its status
        return ""


def _retry_after(response: Response) -> float:
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry

    try:
        return float(Retry().parse_retry_after(response.headers.get("Retry-After", "0")))
    except InvalidHeader:
        return 0.0


def _login_wanted(host: str, found: str) -> RequestError:
    return RequestError(
        "The registry wants a login.",
        found=found,
        expected=f"credentials for {host} in {docker_config()}{'' if os.environ.get('DOCKER_CONFIG') else ' (or $DOCKER_CONFIG)'}",  # noqa: E501
        todo=f"docker login {host} (or oras, skopeo or helm registry login)",
    )


def _first_line(error: Exception) -> str:
    """An exception's message without the layers of libraries around the reason."""
    line = (str(error).splitlines() or [""])[0]
    cause = line.rpartition("(Caused by ")[2]
    return (cause[cause.index("[Errno") :] if "[Errno" in cause else cause).strip("')\"")[:200]
