"""Errors of S3 servers and clients, as tercet errors."""

from __future__ import annotations

from tercet.errors import AccessDenied, BucketNotFound, Conflict, ObjectNotFound, StorageError, StorageUnavailable

# Codes of the server and exceptions of the client that mean: these credentials are not accepted.
DENIED = {
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"),
    *("ProfileNotFound", "SSOTokenLoadError", "UnauthorizedSSOTokenError", "LoginTokenLoadError"),
    *("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "AuthorizationHeaderMalformed"),
}

# Codes with status 400 that are worth another attempt all the same.
TRANSIENT = {"RequestTimeout", "BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody", "Throttling"}


def client_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that the S3 client raises for a request; writing a local file raises others."""
    import asyncio

    from aiohttp import ClientError as HttpError
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    return BotoCoreError, ClientError, HttpError, ResponseParserError, asyncio.TimeoutError


def error_code(error: Exception) -> str:
    """Return the code that the server gave, or the name of the client's exception."""
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", type(error).__name__))


def as_storage_error(error: Exception, server: str, bucket: str, uri: str) -> StorageError:
    """Return an error about the object at `uri` as a tercet error. Only StorageUnavailable is worth another attempt."""
    response = getattr(error, "response", None) or {}
    code, status = error_code(error), response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in ("PreconditionFailed", "412"):
        return Conflict(f"{uri} has changed")
    if code == "NoSuchBucket":
        return BucketNotFound(
            f"{server} has no bucket {bucket!r}", "Create it, or check its name, the endpoint and the region."
        )
    if status in (401, 403) or code in DENIED:
        return AccessDenied(
            f"{server} denied access to {uri} ({code})",
            "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or AWS_PROFILE, the age of a temporary "
            "token, the permissions of this identity, the region, and this machine's clock.",
        )
    if status == 404:
        return ObjectNotFound(f"{uri} does not exist")
    if (status and status < 500 and status not in (409, 429) and code not in TRANSIENT) or status == 501:
        return StorageError(f"{server} refused {uri}: {error}", "The server may not support this request.")
    if type(error).__name__ in ("ParamValidationError", "InvalidRegionError"):
        return StorageError(f"{uri}: {error}", "Check the bucket's name and the region.")
    return StorageUnavailable(
        f"{server} did not answer for {uri} ({code}: {error})",
        "Check that the server runs, and that this machine can reach it: the endpoint (AWS_ENDPOINT_URL), the network, "
        "a proxy, TLS certificates (AWS_CA_BUNDLE).",
    )
