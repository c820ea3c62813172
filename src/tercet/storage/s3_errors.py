"""What S3 servers and clients answer, in tercet's errors."""

from __future__ import annotations

# A 400 of the server or an exception of the client, each of which means: these credentials will not do.
DENIED = {
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"),
    *("ProfileNotFound", "SSOTokenLoadError", "UnauthorizedSSOTokenError", "LoginTokenLoadError"),
    *("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "AuthorizationHeaderMalformed"),
}

TRANSIENT = {"RequestTimeout", "BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody", "Throttling"}  # 400s, too


def client_errors() -> tuple[type[Exception], ...]:
    """What the S3 client raises for a request, as opposed to what writing a local file raises."""
    import asyncio

    from aiohttp import ClientError as HttpError
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    return BotoCoreError, ClientError, HttpError, ResponseParserError, asyncio.TimeoutError
