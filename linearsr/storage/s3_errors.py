"""Explain errors of boto3 and pyarrow, and say what the user can do about them."""

from __future__ import annotations

from boto3.exceptions import (  # type: ignore[import-untyped]
    RetriesExceededError as Boto3RetriesExceeded,
)
from botocore import exceptions as boto  # type: ignore[import-untyped]
from s3transfer.exceptions import RetriesExceededError  # type: ignore[import-untyped]

from linearsr.errors import (
    Denied,
    LinearSRError,
    MissingBucket,
    MissingFile,
    Throttled,
    Unreachable,
    WrongRegion,
)
from linearsr.storage.s3 import S3Path, max_attempts

Cause = tuple[type[LinearSRError], str]

_NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.ProfileNotFound,
)
# The last two are for bodies that broke off; boto3 renames s3transfer's error for some calls.
_NO_ANSWER = (
    boto.ConnectionError,
    boto.HTTPClientError,
    RetriesExceededError,
    Boto3RetriesExceeded,
)
ERRORS = (boto.BotoCoreError, boto.ClientError, *_NO_ANSWER)
"""All that boto3 raises when a request fails."""

# S3's codes, and HTTP's numbers for answers without a body.
_THROTTLED = {"SlowDown", "ServiceUnavailable", "Throttling", "ThrottlingException", "429", "503"}
_THROTTLED |= {"RequestLimitExceeded", "TooManyRequests", "TooManyRequestsException"}
_DENIED = {"AccessDenied", "SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken", "403"}
_DENIED |= {"InvalidToken", "TokenRefreshRequired", "AllAccessDisabled", "AccountProblem", "401"}
_DENIED |= {"RequestTimeTooSkewed", "UnauthorizedAccess"}
_REGION = {"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "301", "307"}
_REGION |= {"IllegalLocationConstraintException"}
_FAILING = {"InternalError", "RequestTimeout", "500", "502", "504"}


def clearest_error(error: Exception, path: S3Path, *, writing: bool) -> Exception:
    """Return the error or, if it is unclear, the one that a second request to S3 gives.

    Errors of pyarrow are unclear: they are prose, and at times call throttling AccessDenied (ray
    issue 47230). So are those of boto3 with nothing but HTTP's 301, 307, 400, 403 or 404. writing:
    whether the first request wrote, so that the object need not exist.
    """
    if isinstance(error, ERRORS) and _code(error) not in {"301", "307", "400", "403", "404"}:
        return error
    try:
        if path.key and not writing:
            path.client.get_object(Bucket=path.bucket, Key=path.key)["Body"].close()
        else:  # An object that is to be written need not exist.
            path.client.list_objects_v2(Bucket=path.bucket, Prefix=path.key, MaxKeys=1)
    except (boto.BotoCoreError, boto.ClientError) as clearer:
        return clearer
    return error


def cause(error: Exception) -> Cause | None:
    """Return the class to raise and the advice to give, or None if the storage is not to blame."""
    if isinstance(error, _NO_CREDENTIALS):
        return Denied, "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if isinstance(error, _NO_ANSWER):
        return Unreachable, "the storage does not answer; check AWS_ENDPOINT_URL and the network"
    number = max_attempts()
    failing = f"the storage fails in up to {number} attempts; try later, or raise AWS_MAX_ATTEMPTS"
    # An error of pyarrow for a request that S3 grants by now. A damaged file is an OSError too.
    if isinstance(error, OSError) and "AWS Error" in str(error):
        return Unreachable, failing
    throttled = (
        f"throttled in up to {number} attempts; use fewer workers, or raise AWS_MAX_ATTEMPTS"
    )
    denied = "denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, the permissions and the clock"
    no_bucket = "there is no such bucket; create it, or check its name"
    causes: list[tuple[set[str], Cause]] = [
        (_THROTTLED, (Throttled, throttled)),
        (_DENIED, (Denied, denied)),
        ({"NoSuchBucket"}, (MissingBucket, no_bucket)),
        (_REGION, (WrongRegion, f"wrong region; set AWS_REGION to {_right_region(error)}")),
        ({"NoSuchKey", "404"}, (MissingFile, "there is no such file")),
        (_FAILING, (Unreachable, failing)),
    ]
    code = _code(error)
    return next((cause for codes, cause in causes if code in codes), None)


def _code(error: Exception) -> str:
    """Return S3's code for an error, or HTTP's number if the answer had no body to name it in."""
    response = error.response if isinstance(error, boto.ClientError) else {}
    return str(response.get("Error", {}).get("Code", ""))


def _right_region(error: Exception) -> str:
    response = error.response if isinstance(error, boto.ClientError) else {}
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region")
    return region or "that of the bucket"
