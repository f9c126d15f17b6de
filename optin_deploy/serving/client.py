"""A client of the V2 inference protocol over HTTP or gRPC that does not trust its server: bounds and timeouts."""

from __future__ import annotations

import http.client
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from optin_deploy.errors import BadInput, MissingDependency, ServerFault
from optin_deploy.runtimes.base import Closing, Feeds
from optin_deploy.serving.manifest import DATATYPES, TensorSpec

METADATA_BYTES = 2**20
"""Most bytes of one answer about a server or a model; real ones have a few KiB."""
ANSWER_BYTES = 2**30
"""Most bytes of one inference; the states of 32 texts of 512 tokens have a few dozen MiB."""
HEADER_LENGTH = "Inference-Header-Content-Length"
"""Bytes of JSON before the values, where these are sent as bytes."""
SHOWN = 300
"""Characters of a server's message that go into an error of ours."""


class ServedClient(Closing):
    """One connection; a context manager. Each thread takes its own."""

    @abstractmethod
    def metadata(self, name: str, version: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Inputs and outputs of a model as the server says them.

        Args: version: empty: the server's choice.
        Raises: ServerFault.
        """

    @abstractmethod
    def infer(self, name: str, feeds: Feeds, version: str) -> dict[str, np.ndarray]:
        """Run once; all outputs by name.

        Raises: ServerFault.
        """


def connect(url: str, timeout: float) -> ServedClient:
    """Open a connection to a server that is ready.

    Args: url: http://host:port or grpc://host:port. timeout: seconds that any answer may take.
    Raises: BadInput: not such a URL. MissingDependency. ServerFault: nobody answers, or it is not ready.
    """
    try:
        parts = urlsplit(url)
        address, scheme = f"{parts.hostname}:{parts.port}", parts.scheme
        whole = parts.hostname is not None and parts.port is not None and parts.path in ("", "/") and not parts.query
    except ValueError:
        whole, address, scheme = False, "", ""
    if not whole or scheme not in CLIENTS or parts.username is not None:
        raise BadInput(f"--url {url[:80]!r}: give http://host:port or grpc://host:port, such as http://127.0.0.1:8000.")
    if timeout <= 0:
        raise BadInput(f"--timeout {timeout:g}: give a positive number of seconds.")
    return CLIENTS[scheme](address, timeout)


class HttpClient(ServedClient):
    """A client over HTTP; tensors are sent as bytes where the server offers it, else as JSON.

    tritonclient's own connections cannot leave the thread they were made in; it writes and reads the messages here.
    """

    def __init__(self, address: str, timeout: float) -> None:
        """See `connect`."""
        self._library = _tritonclient("http")
        self._address = address
        self._connection = http.client.HTTPConnection(address, timeout=timeout)
        try:
            self._exchange("GET", "/v2/health/ready", METADATA_BYTES)
            offered = self._json("/v2").get("extensions")
        except ServerFault:
            self.close()
            raise
        self._binary = isinstance(offered, list) and "binary_tensor_data" in offered

    def metadata(self, name: str, version: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """See `ServedClient.metadata`."""
        data = self._json(_path(name, version))
        return _specs(data.get("inputs")), _specs(data.get("outputs"))

    def infer(self, name: str, feeds: Feeds, version: str) -> dict[str, np.ndarray]:
        """See `ServedClient.infer`."""
        client = self._library.InferenceServerClient
        inputs = []
        for key, values in feeds.items():
            inputs.append(self._library.InferInput(key, list(values.shape), _datatype(values)))
            inputs[-1].set_data_from_numpy(values, binary_data=self._binary)
        body, length = client.generate_request_body(inputs)
        headers = {} if length is None else {HEADER_LENGTH: str(length)}
        data, found = self._exchange("POST", f"{_path(name, version)}/infer", ANSWER_BYTES, body, headers)
        length = int(found) if found is not None and found.isascii() and found.isdigit() else None
        return _answer(
            lambda: client.parse_response_body(data, header_length=length),
            lambda answer: [each["name"] for each in answer.get_response()["outputs"]],
        )

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def _json(self, path: str) -> dict[str, Any]:
        try:
            data = json.loads(self._exchange("GET", path, METADATA_BYTES)[0])
        except (ValueError, RecursionError) as err:
            raise ServerFault(f"{self._address}{path} did not answer with JSON: is it a V2 inference server?") from err
        if not isinstance(data, dict):
            raise ServerFault(f"{self._address}{path} answered with a {type(data).__name__}, not an object.")
        return data

    def _exchange(
        self, method: str, path: str, limit: int, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[bytes, str | None]:
        """One request.

        Returns: the answer, of at most `limit` bytes, and how long its JSON is if values follow as bytes.
        """
        try:
            self._connection.request(method, path, body, dict(headers or {}))
            with self._connection.getresponse() as answer:
                data = answer.read(limit + 1)
                length = answer.getheader(HEADER_LENGTH)
                if len(data) > limit:
                    self._connection.close()
        except (OSError, http.client.HTTPException, ValueError) as err:  # refused, timed out, or not HTTP
            self._connection.close()
            raise ServerFault(
                f"{self._address} does not answer over HTTP ({err}). Is the server up, and is that its HTTP port?"
            ) from err
        if len(data) > limit:
            raise ServerFault(f"{self._address}{path} answered with more than {limit} bytes; refused.")
        if answer.status != http.client.OK:
            said = data[:SHOWN].decode(errors="replace")
            raise ServerFault(f"{self._address}{path}: status {answer.status}. {said}")
        return data, length


class GrpcClient(ServedClient):
    """A client over gRPC."""

    def __init__(self, address: str, timeout: float) -> None:
        """See `connect`."""
        self._library = _tritonclient("grpc")
        self._timeout = timeout
        limits = [("grpc.max_receive_message_length", ANSWER_BYTES), ("grpc.max_send_message_length", ANSWER_BYTES)]
        small = [("grpc.max_receive_message_length", METADATA_BYTES)]
        self._client = self._library.InferenceServerClient(address, channel_args=limits)
        self._asking = self._library.InferenceServerClient(address, channel_args=small)
        try:
            if not _asked(lambda: self._asking.is_server_ready(client_timeout=timeout), address):
                raise ServerFault(f"{address} is not ready. Wait until its models are loaded.")
        except ServerFault:
            self.close()
            raise

    def metadata(self, name: str, version: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """See `ServedClient.metadata`."""
        data = _asked(lambda: self._asking.get_model_metadata(name, version, client_timeout=self._timeout), name)
        return tuple(
            _specs([{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in tensors])
            for tensors in (data.inputs, data.outputs)
        )  # type: ignore[return-value]  # two of them

    def infer(self, name: str, feeds: Feeds, version: str) -> dict[str, np.ndarray]:
        """See `ServedClient.infer`."""
        inputs = []
        for key, values in feeds.items():
            inputs.append(self._library.InferInput(key, list(values.shape), _datatype(values)))
            inputs[-1].set_data_from_numpy(values)
        return _answer(
            lambda: self._client.infer(name, inputs, model_version=version, client_timeout=self._timeout),
            lambda answer: [each.name for each in answer.get_response().outputs],
        )

    def close(self) -> None:
        """End the connection."""
        self._client.close()
        self._asking.close()


CLIENTS: Mapping[str, Callable[[str, float], ServedClient]] = {"http": HttpClient, "grpc": GrpcClient}
"""Scheme of a URL -> client."""


def _path(name: str, version: str) -> str:
    return f"/v2/models/{name}" + (f"/versions/{version}" if version else "")


def _tritonclient(protocol: str) -> Any:
    try:
        return import_module(f"tritonclient.{protocol}")
    except ImportError as err:  # tritonclient raises its own where a protocol's packages are missing
        raise MissingDependency("tritonclient is not installed. Run: pip install 'optin-deploy[serve]'") from err


def _datatype(values: np.ndarray) -> str:
    return next(name for name, kind in DATATYPES.items() if kind == values.dtype.name)


def _specs(entries: object) -> tuple[TensorSpec, ...]:
    """What a server says of its tensors, checked."""
    if not isinstance(entries, Sequence):
        raise ServerFault(f"the server's metadata has no list of tensors, but {str(entries)[:SHOWN]!r}.")
    try:
        return tuple(
            TensorSpec(str(each["name"]), str(each["datatype"]), tuple(int(size) for size in each["shape"]))
            for each in entries
        )
    except (TypeError, KeyError, ValueError) as err:
        raise ServerFault(f"the server's metadata is not of the V2 protocol: {str(err)[:SHOWN]}") from err


def _asked(call: Callable[[], Any], what: str) -> Any:
    from tritonclient.utils import InferenceServerException

    try:
        return call()
    except InferenceServerException as err:
        raise ServerFault(f"{what}: {str(err)[:SHOWN]}") from err


def _answer(call: Callable[[], Any], names: Callable[[Any], list[str]]) -> dict[str, np.ndarray]:
    """The outputs of an inference; whatever a server sends, the error is ours."""
    from tritonclient.utils import InferenceServerException

    try:
        answer = call()
        found = {name: answer.as_numpy(name) for name in names(answer)}
    except InferenceServerException as err:
        raise ServerFault(f"the server refused: {str(err)[:SHOWN]}") from err
    except (ValueError, KeyError, TypeError, OSError, MemoryError) as err:
        raise ServerFault(f"the server's answer does not hold what it says: {str(err)[:SHOWN]}") from err
    missing = [name for name, values in found.items() if values is None]
    if missing:
        raise ServerFault(f"the server's answer names {missing[0][:80]!r}, but holds no values of it.")
    return found
