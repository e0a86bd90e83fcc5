"""What each ESP reads in a request and how it answers: the endpoints, bodies and errors that Anymail 15.2 meets.

One class per requests-based ESP of Anymail. Success answers carry as many ids and recipients as the request names, so
that Anymail's parser takes them. Errors have the ESP's own form; texts are of the ESP where it publishes them.
"""

from __future__ import annotations

import base64
import json
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from email.utils import getaddresses
from typing import Any, ClassVar, NamedTuple
from urllib.parse import parse_qs

from anymail_retry.testing.keys import KeyRules
from anymail_retry.testing.ledger import Request
from anymail_retry.testing.wire import HTML, Answer, json_answer, page, reason

#: Gives a new id for a message on each call.
Ids = Callable[[], uuid.UUID]


class Taken(NamedTuple):
    """What the ESP takes with one request."""

    recipients: list[str]
    subject: str
    message_ids: list[str]
    answer: Answer


class Provider:
    """One ESP. The subclasses are the table; nothing here knows of sockets, faults or keys in use."""

    #: As Anymail's ``esp_name``.
    name: ClassVar[str]
    #: Path of ``api_url``.
    api_path: ClassVar[str]
    #: Matches a whole path; its first group is the endpoint as Anymail's payload names it.
    paths: ClassVar[re.Pattern[str]]
    #: The back end's options besides ``api_url``; the first is the API key.
    credentials: ClassVar[Mapping[str, str]] = {"api_key": "test-api-key"}
    #: The HTTP header with the API key.
    key_header: ClassVar[str] = "authorization"
    #: How the ESP treats idempotency keys; None: it has none.
    keys: ClassVar[KeyRules | None] = None
    #: Arguments of :meth:`error_body` by status, or by (status, kind).
    errors: ClassVar[Mapping[int | tuple[int, str], Any]] = {}

    def parse(self, request: Request) -> Any:
        """The body, decoded; raises ``ValueError`` where it cannot be."""
        return json.loads(request.body)

    def api_key(self, request: Request, data: Any) -> str | None:
        """The API key that the request carries."""
        value = request.headers.get(self.key_header, "")
        scheme, _, rest = value.partition(" ")
        if scheme == "Basic":
            user, _, password = base64.b64decode(rest).decode("latin-1").partition(":")
            value = password if user == "api" else user  # Mailgun: ("api", key); Mailjet: (key, secret)
        elif scheme == "Bearer":
            value = rest
        return value or None

    def idempotency_key(self, request: Request, data: Any) -> str | None:
        """The idempotency key that the request carries; None: none, or this ESP knows none."""
        return None

    def take(self, endpoint: str, data: Any, ids: Ids) -> Taken:
        """What the ESP takes, and its answer."""
        raise NotImplementedError

    def error(self, status: int, kind: str | None = None) -> Answer:
        """The ESP's own answer with that status: its JSON where it is known to answer so itself, else a page.

        :param kind: tells apart what has one status, such as ``"quota"`` of 429.
        """
        known = self.errors.get((status, kind)) if kind else self.errors.get(status)
        if known is None and kind:
            raise ValueError(f"{self.name} has no {kind!r} of status {status}")
        if known is None and status > 500:
            return page(status)
        return json_answer(status, self.error_body(status, known or reason(status)))

    def error_body(self, status: int, known: Any) -> Any:
        """The JSON of an error; ``known`` is its entry in :attr:`errors`, or the bare reason phrase."""
        raise NotImplementedError

    def wrong_api_key(self) -> Answer:
        """The answer to an API key that the ESP does not know."""
        return self.error(401)


def addresses(objects: Iterable[Mapping[str, Any]], field: str = "email") -> list[str]:
    """Bare addresses of ``[{"email": ..., "name": ...}, ...]``."""
    return [item[field] for item in objects]


def parse_addresses(formatted: str | Iterable[str]) -> list[str]:
    """Bare addresses of ``'Name <a@example.com>, b@example.com'`` or of a list of such."""
    return [address for _, address in getaddresses([formatted] if isinstance(formatted, str) else list(formatted))]


def to_cc_bcc(data: Mapping[str, Any]) -> list[str]:
    """Bare addresses of the lists of objects ``to``, ``cc`` and ``bcc``."""
    return [address for field in ("to", "cc", "bcc") for address in addresses(data.get(field, []))]


class Brevo(Provider):
    name = "Brevo"
    api_path = "/v3/"
    paths = re.compile(r"/v3/(smtp/email)")
    key_header = "api-key"
    # Codes: github.com/getbrevo/brevo-python error_model.py. The API has no documented body of 429.
    errors = {
        400: ("invalid_parameter", "valid sender email required"),
        (400, "duplicate"): (
            "duplicate_parameter",
            "Email for the idempotency key has already been processed",
        ),
        401: ("unauthorized", "Key not found"),
        402: ("not_enough_credits", "Not enough credits"),
        403: ("permission_denied", "Permission denied"),
        (403, "account"): ("account_under_validation", "Account under validation"),
        404: ("document_not_found", "Document not found"),
        429: ("too_many_requests", "Too many requests"),
    }
    # https://developers.brevo.com/docs/heterogenous-versions-batch-emails (30 minutes; a changelog of before: 15).
    # The answer: measured, https://github.com/getbrevo/brevo-node/issues/94. It compares keys only. What it says
    # while the first request is still under way is not known.
    _duplicate = json_answer(400, dict(zip(("code", "message"), errors[400, "duplicate"], strict=True)))
    keys = KeyRules(
        window=30 * 60,
        grammar=re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"),
        invalid=json_answer(400, {"code": "invalid_parameter", "message": "idempotencyKey must be a UUID"}),
        in_progress=_duplicate,
        duplicate=_duplicate,
    )

    def idempotency_key(self, request: Request, data: Any) -> str | None:
        key = data.get("headers", {}).get("idempotencyKey")  # this spelling only, and never the HTTP header
        return None if key is None else str(key)

    def take(self, endpoint: str, data: Any, ids: Ids) -> Taken:
        versions = data.get("messageVersions")
        recipients = [address for version in versions or () for address in to_cc_bcc(version)] + to_cc_bcc(data)
        message_ids = [f"<{ids()}@smtp-relay.mailin.fr>" for _ in versions or [data]]
        body = {"messageId": message_ids[0]} if versions is None else {"messageIds": message_ids}
        return Taken(recipients, data.get("subject", ""), message_ids, json_answer(201, body))

    def error_body(self, status: int, known: Any) -> Any:
        code, message = known if isinstance(known, tuple) else ("bad_request", known)
        return {"code": code, "message": message}


class MailerSend(Provider):
    name = "MailerSend"
    api_path = "/v1/"
    paths = re.compile(r"/v1/(email|bulk-email)")
    credentials = {"api_token": "test-api-token"}
    # The two kinds of 429: https://www.mailersend.com/help/rate-limits-how-to-reduce-403-422-429-errors
    errors = {
        401: "Unauthenticated.",
        403: "This action is unauthorized.",
        421: "Service is not available, try again later.",
        422: "The from.email domain must be verified in your account to send emails. #MS42207",
        429: "Too many requests per minute. #MS42903",
        (429, "quota"): "The daily API quota is used up. #MS42901",
        500: "Server Error",
        503: "Service Unavailable",
    }

    def take(self, endpoint: str, data: Any, ids: Ids) -> Taken:
        if endpoint == "bulk-email":
            bulk_id = ids().hex
            answer = json_answer(202, {"message": "The bulk email is being processed.", "bulk_email_id": bulk_id})
            recipients = [address for message in data for address in to_cc_bcc(message)]
            return Taken(recipients, data[0].get("subject", ""), [bulk_id], answer)
        message_id = ids().hex
        answer = Answer(202, headers={"Content-Type": HTML, "X-Message-Id": message_id})
        return Taken(to_cc_bcc(data), data.get("subject", ""), [message_id], answer)

    def error_body(self, status: int, known: Any) -> Any:
        if status == 422:
            return {"message": "The given data was invalid.", "errors": {"from.email": [known]}}
        return {"message": known}


class Mailgun(Provider):
    name = "Mailgun"
    api_path = "/v3"
    paths = re.compile(r"/v3/[^/]+/(messages)")
    credentials = {"api_key": "test-api-key", "sender_domain": "example.com"}
    errors = {
        400: "'to' parameter is not a valid address. please check documentation",
        402: "Payment required",
        404: "Domain not found: example.com",
        429: "Too many requests",
        500: "Internal Server Error",
    }

    def parse(self, request: Request) -> dict[str, list[str]]:
        kind, _, parameters = request.headers.get("content-type", "").partition(";")
        if kind.strip() != "multipart/form-data":
            return parse_qs(request.body.decode(), keep_blank_values=True)
        boundary = parameters.partition("boundary=")[2].strip('" ').encode()
        fields: dict[str, list[str]] = {}
        for part in request.body.split(b"--" + boundary)[1:-1]:
            head, _, content = part.partition(b"\r\n\r\n")
            name = re.search(rb'\bname="([^"]*)"', head)
            if name and b"filename" not in head:
                fields.setdefault(name[1].decode(), []).append(content[:-2].decode())
        return fields

    def take(self, endpoint: str, data: Any, ids: Ids) -> Taken:
        recipients = parse_addresses(address for field in ("to", "cc", "bcc") for address in data.get(field, []))
        message_id = f"<{ids()}@example.com>"
        answer = json_answer(200, {"id": message_id, "message": "Queued. Thank you."})
        return Taken(recipients, data.get("subject", [""])[0], [message_id], answer)

    def error(self, status: int, kind: str | None = None) -> Answer:
        if status == 401 and kind is None:
            return Answer(401, b"Forbidden", {"Content-Type": "text/plain"})
        return super().error(status, kind)

    def error_body(self, status: int, known: Any) -> Any:
        return {"message": known}


class Mailjet(Provider):
    name = "Mailjet"
    api_path = "/v3.1/"
    paths = re.compile(r"/v3\.1/(send)")
    credentials = {"api_key": "test-api-key", "secret_key": "test-secret-key"}
    errors = {
        401: ("mj-0002", "API key authentication/authorization failure."),
        403: ("mj-0002", "Not authorized to access this resource."),
        500: ("mj-0001", "Internal server error."),
    }

    def take(self, endpoint: str, data: Any, ids: Ids) -> Taken:
        everyone = data["Globals"]
        recipients, message_ids, results = [], [], []
        for message in data["Messages"]:
            result: dict[str, Any] = {"Status": "success", "CustomID": ""}
            for field in ("To", "Cc", "Bcc"):
                copies = message.get(field, everyone.get(field, []))
                result[field] = [self._copy(copy["Email"], ids()) for copy in copies]
                recipients += addresses(result[field], "Email")
                message_ids += [str(copy["MessageID"]) for copy in result[field]]
            results.append(result)
        return Taken(recipients, everyone.get("Subject", ""), message_ids, json_answer(200, {"Messages": results}))

    @staticmethod
    def _copy(email: str, message_uuid: uuid.UUID) -> dict[str, Any]:
        message_id = message_uuid.int & (2**53 - 1)
        return {
            "Email": email,
            "MessageUUID": str(message_uuid),
            "MessageID": message_id,
            "MessageHref": f"https://api.mailjet.com/v3/REST/message/{message_id}",
        }

    def error(self, status: int, kind: str | None = None) -> Answer:
        if status == 429 and kind is None:
            return page(429)  # not JSON: github.com/mailjet/mailjet-apiv3-nodejs/issues/178
        return super().error(status, kind)

    def error_body(self, status: int, known: Any) -> Any:
        if status == 400:  # per message: the form that partial success has too
            error = {
                "ErrorIdentifier": str(uuid.UUID(int=status)),
                "ErrorCode": "mj-0013",
                "StatusCode": 400,
                "ErrorMessage": "An address is invalid.",
                "ErrorRelatedTo": ["To[0].Email"],
            }
            return {"Messages": [{"Status": "error", "Errors": [error]}]}
        code, message = known if isinstance(known, tuple) else ("mj-0003", known)
        return {
            "ErrorIdentifier": str(uuid.UUID(int=status)),
            "ErrorCode": code,
            "StatusCode": status,
            "ErrorMessage": message,
        }


class Mailtrap(Provider):
    name = "Mailtrap"
    api_path = "/api/"
    paths = re.compile(r"/api/((?:send|batch)(?:/[^/]+)?)")
    credentials = {"api_token": "test-api-token"}
    key_header = "api-token"
    errors = {
        400: "'from' is required",
        401: "Unauthorized",
        403: "Forbidden",
        429: "Rate limit exceeded",
        (429, "quota"): "Billing plan limit exhausted",
        500: "Internal error, retry later or contact support",
    }

    def take(self, endpoint: str, data: Any, ids: Ids) -> Taken:
        kind, _, sandbox = endpoint.partition("/")
        messages = data["requests"] if kind == "batch" else [data]
        recipients: list[str] = []
        responses = []
        for message in messages:
            receivers = to_cc_bcc(message)
            recipients += receivers
            # A sandbox makes one id per message, sending one per recipient.
            responses.append(
                {"success": True, "message_ids": [str(ids()) for _ in (receivers[:1] if sandbox else receivers)]}
            )
        message_ids = [message_id for response in responses for message_id in response["message_ids"]]  # type: ignore[attr-defined]  # the other value is a bool
        subject = data["base"].get("subject", "") if kind == "batch" else data.get("subject", "")
        body = {"success": True, "responses": responses} if kind == "batch" else responses[0]
        return Taken(recipients, subject, message_ids, json_answer(200, body))

    def error_body(self, status: int, known: Any) -> Any:
        return {"success": False, "errors": [known]}


class Mandrill(Provider):
    name = "Mandrill"
    api_path = "/api/1.0"
    paths = re.compile(r"/api/1\.0/(messages/send(?:-template)?\.json)")
    # Names: github.com/mailchimp/mailchimp-client-lib-codegen spec/transactional.openapi.json
    errors = {
        400: (-2, "ValidationError", "You must specify a message"),
        401: (-1, "Invalid_Key", "Invalid API key"),
        402: (10, "PaymentRequired", "The requested feature requires payment."),
        404: (5, "Unknown_Template", 'No such template "unknown"'),
        429: (-2, "RequestLimitExceeded", "Too many requests"),
        500: (-99, "GeneralError", "An unexpected error occurred. Try again later."),
        # An error that can never succeed under 500, as every one was until 2023.
        (500, "permanent"): (-2, "ValidationError", "You must specify a message"),
        503: (-2, "ServiceUnavailable", "The subsystem providing this API call is down for maintenance"),
    }

    def api_key(self, request: Request, data: Any) -> str | None:
        return data.get("key") or None

    def take(self, endpoint: str, data: Any, ids: Ids) -> Taken:
        recipients = addresses(data["message"].get("to", []))
        results = [
            {"email": address, "status": "sent", "_id": ids().hex, "reject_reason": None} for address in recipients
        ]
        message_ids = [str(result["_id"]) for result in results]
        return Taken(recipients, data["message"].get("subject", ""), message_ids, json_answer(200, results))

    def error_body(self, status: int, known: Any) -> Any:
        code, name, message = known if isinstance(known, tuple) else (-99, "GeneralError", known)
        return {"status": "error", "code": code, "name": name, "message": message}


class Postal(Provider):
    name = "Postal"
    api_path = "/"
    paths = re.compile(r"/(api/v1/send/message)")
    key_header = "x-server-api-key"
    errors = {
        401: ("InvalidServerAPIKey", "The API token provided in X-Server-API-Key was not valid."),
        403: ("AccessDenied", "Must be authenticated as a server."),
    }

    def take(self, endpoint: str, data: Any, ids: Ids) -> Taken:
        recipients = parse_addresses(address for field in ("to", "cc", "bcc") for address in data.get(field, []))
        messages = {address: {"id": ids().int, "token": ids().hex} for address in recipients}
        body = {
            "status": "success",
            "time": 0.01,
            "flags": {},
            "data": {"message_id": f"{ids()}@rp.postal.example.com", "messages": messages},
        }
        message_ids = [str(message["id"]) for message in messages.values()]
        return Taken(recipients, data.get("subject", ""), message_ids, json_answer(200, body))

    def error_body(self, status: int, known: Any) -> Any:
        code, message = known if isinstance(known, tuple) else ("parameter-error", known)
        return {"status": "error", "time": 0.0, "flags": {}, "data": {"code": code, "message": message}}

    def wrong_api_key(self) -> Answer:
        # Postal answers 200 whatever it says: github.com/postalserver/postal
        # app/controllers/legacy_api/base_controller.rb
        return json_answer(200, self.error_body(200, self.errors[401]))


class Postmark(Provider):
    name = "Postmark"
    api_path = "/"
    paths = re.compile(r"/(email(?:/withTemplate/|/batch|/batchWithTemplates|/bulk)?)")
    credentials = {"server_token": "test-server-token"}
    key_header = "x-postmark-server-token"
    # https://postmarkapp.com/developer/api/overview
    errors = {
        401: (10, "No Account or Server API tokens were supplied in the HTTP headers."),
        422: (300, "Invalid 'From' address."),
        (422, "account"): (405, "Not allowed to send: out of credits."),
        (422, "recipients"): (
            406,
            "Found inactive addresses: to@example.com. Inactive recipients have generated a hard bounce.",
        ),
        429: (429, "Rate limit exceeded."),
        500: (0, "Internal Server Error"),
        503: (100, "Maintenance."),
    }

    def take(self, endpoint: str, data: Any, ids: Ids) -> Taken:
        if endpoint in {"email/batchWithTemplates", "email/bulk"}:
            messages = data["Messages"]
        else:
            messages = data if endpoint == "email/batch" else [data]
        recipients = [
            address
            for message in messages
            for address in parse_addresses(message[field] for field in ("To", "Cc", "Bcc") if field in message)
        ]
        first = data if endpoint == "email/bulk" else messages[0]
        subject = first.get("Subject", "")
        submitted = "2026-01-01T00:00:00.0000000Z"
        if endpoint == "email/bulk":
            bulk_id = str(ids())
            bulk = {
                "ID": bulk_id,
                "SubmittedAt": submitted,
                "TotalMessages": len(messages),
                "PercentageCompleted": 0.0,
                "Status": "Accepted",
                "Subject": subject,
            }
            return Taken(recipients, subject, [bulk_id], json_answer(200, bulk))
        message_ids = [str(ids()) for _ in messages]
        results: list[dict[str, Any]] = [
            {
                **({"To": message["To"]} if "To" in message else {}),
                "SubmittedAt": submitted,
                "MessageID": message_id,
                "ErrorCode": 0,
                "Message": "OK",
            }
            for message, message_id in zip(messages, message_ids, strict=True)
        ]
        batch = endpoint.startswith("email/batch")
        return Taken(recipients, subject, message_ids, json_answer(200, results if batch else results[0]))

    def error_body(self, status: int, known: Any) -> Any:
        # ErrorCodes are no HTTP statuses: 413, say, is an account that may not send.
        code, message = known if isinstance(known, tuple) else (0, known)
        return {"ErrorCode": code, "Message": message}


def _resend_error(status: int, name: str, message: str) -> Any:
    return {"statusCode": status, "name": name, "message": message}


class Resend(Provider):
    name = "Resend"
    api_path = "/"
    paths = re.compile(r"/(emails(?:/batch)?)")
    # https://resend.com/docs/api-reference/errors ; of a wrong key it really says 401 and validation_error:
    # github.com/resend/resend-node/pull/617
    errors = {
        400: ("validation_error", "The request is invalid"),
        401: ("validation_error", "API key is invalid"),
        403: ("validation_error", "The example.com domain is not verified."),
        404: ("not_found", "The requested endpoint does not exist"),
        409: ("invalid_idempotent_request", "Same idempotency key used with a different request payload"),
        (409, "in progress"): (
            "concurrent_idempotent_requests",
            "Same idempotency key used while the original request is still in progress",
        ),
        422: ("missing_required_field", "The `from` field is missing"),
        429: ("rate_limit_exceeded", "Too many requests"),
        (429, "quota"): ("daily_quota_exceeded", "You have reached your daily email sending quota"),
        (429, "monthly quota"): ("monthly_quota_exceeded", "You have reached your monthly email sending quota"),
        451: ("security_error", "A security issue was found with the request"),
        500: ("application_error", "An unexpected error occurred"),
    }
    # https://resend.com/docs/dashboard/emails/idempotency-keys
    keys = KeyRules(
        window=24 * 3600,
        grammar=re.compile(r".{1,256}"),
        invalid=json_answer(400, _resend_error(400, "invalid_idempotency_key", "The key must be between 1-256 chars")),
        in_progress=json_answer(409, _resend_error(409, *errors[409, "in progress"])),
        other_body=json_answer(409, _resend_error(409, *errors[409])),
    )

    def idempotency_key(self, request: Request, data: Any) -> str | None:
        return request.headers.get("idempotency-key")

    def take(self, endpoint: str, data: Any, ids: Ids) -> Taken:
        messages = data if endpoint == "emails/batch" else [data]
        recipients = [
            address
            for message in messages
            for field in ("to", "cc", "bcc")
            for address in parse_addresses(message.get(field, []))
        ]
        message_ids = [str(ids()) for _ in messages]
        results = [{"id": message_id} for message_id in message_ids]
        body = {"data": results} if endpoint == "emails/batch" else results[0]
        return Taken(recipients, messages[0].get("subject", ""), message_ids, json_answer(200, body))

    def error_body(self, status: int, known: Any) -> Any:
        name, message = known if isinstance(known, tuple) else ("validation_error", known)
        return _resend_error(status, name, message)


class Scaleway(Provider):
    name = "Scaleway"
    api_path = "/transactional-email/v1alpha1/regions/fr-par/"
    paths = re.compile(r"/transactional-email/v1alpha1/regions/[^/]+/(emails)")
    credentials = {"secret_key": "test-secret-key", "project_id": "11111111-1111-1111-1111-111111111111"}
    key_header = "x-auth-token"
    # Types: github.com/scaleway/scaleway-sdk-js packages_generated errors
    errors = {
        400: {"type": "invalid_arguments", "details": [{"argument_name": "from", "reason": "required"}]},
        401: {"type": "denied_authentication", "method": "api_key", "reason": "not_found"},
        403: {"type": "permissions_denied", "details": [{"resource": "email", "action": "write"}]},
        (403, "quota"): {
            "type": "quotas_exceeded",
            "details": [{"resource": "emails", "quota": 300, "current": 300}],
        },
        404: {"type": "not_found", "resource": "project", "resource_id": "unknown"},
        429: {
            "type": "too_many_requests",
            "limit": {"allowed": 10, "window_seconds": 1},
            "reset_seconds": 1,
            "reset_at": "2026-01-01T00:00:01Z",
        },
    }

    def take(self, endpoint: str, data: Any, ids: Ids) -> Taken:
        emails = [
            {
                "id": str(ids()),
                "message_id": str(ids()),
                "project_id": data["project_id"],
                "mail_from": data["from"]["email"],
                "mail_rcpt": recipient["email"],
                "rcpt_type": kind,
                "subject": data.get("subject", ""),
                "status": "new",
            }
            for kind in ("to", "cc", "bcc")
            for recipient in data.get(kind, [])
        ]
        message_ids = [email["id"] for email in emails]
        return Taken(to_cc_bcc(data), data.get("subject", ""), message_ids, json_answer(200, {"emails": emails}))

    def error_body(self, status: int, known: Any) -> Any:
        return {"message": reason(status), **(known if isinstance(known, dict) else {"type": "unknown"})}


class SendGrid(Provider):
    name = "SendGrid"
    api_path = "/v3/"
    paths = re.compile(r"/v3/(mail/send)")
    errors = {
        400: ("The from email does not contain a valid address.", "from.email"),
        401: ("The provided authorization grant is invalid, expired, or revoked", None),
        403: ("The from address does not match a verified Sender Identity.", "from"),
        413: ("The JSON payload you have included in your request is too large.", None),
        429: ("too many requests", None),
        500: ("Internal Server Error", None),
    }

    def take(self, endpoint: str, data: Any, ids: Ids) -> Taken:
        recipients = [address for version in data["personalizations"] for address in to_cc_bcc(version)]
        message_id = ids().hex
        answer = Answer(202, headers={"X-Message-Id": message_id})
        return Taken(recipients, data.get("subject", ""), [message_id], answer)

    def error_body(self, status: int, known: Any) -> Any:
        message, field = known if isinstance(known, tuple) else (known, None)
        return {"errors": [{"message": message, "field": field, "help": None}]}


def _sparkpost_error(code: str, message: str) -> Any:
    return {"errors": [{"message": message, "code": code}]}


class SparkPost(Provider):
    name = "SparkPost"
    api_path = "/api/v1/"
    paths = re.compile(r"/api/v1/(transmissions)/?")
    # github.com/SparkPost/developers.sparkpost.com content/api/index.apib; keys: its pull request 590 (the form of
    # the code, a string in errors[], is as in its other errors)
    errors = {
        400: ("1400", "required field is missing"),
        401: ("1401", "Unauthorized."),
        403: ("1403", "Forbidden."),
        409: ("1600", "Idempotency key was used with a different payload"),
        (409, "in progress"): ("1601", "A request with this idempotency key is in progress"),
        420: ("2101", "Exceed Sending Limit"),
        422: ("1300", "invalid data format/type"),
        429: ("1429", "Too many requests"),
        500: ("1500", "Internal Server Error"),
        503: ("1503", "Service unavailable, try again later"),
    }
    keys = KeyRules(
        window=24 * 3600,
        grammar=re.compile(r"[A-Za-z0-9._-]{1,255}"),
        invalid=json_answer(400, _sparkpost_error("1602", "Invalid idempotency key")),
        in_progress=json_answer(409, _sparkpost_error(*errors[409, "in progress"])),
        other_body=json_answer(409, _sparkpost_error(*errors[409])),
        replay_headers={"X-Idempotent-Replayed": "true"},
    )

    def idempotency_key(self, request: Request, data: Any) -> str | None:
        return request.headers.get("idempotency-key")

    def take(self, endpoint: str, data: Any, ids: Ids) -> Taken:
        recipients = [recipient["address"]["email"] for recipient in data["recipients"]]
        transmission = str(ids().int)
        results = {
            "total_rejected_recipients": 0,
            "total_accepted_recipients": len(recipients),
            "id": transmission,
        }
        subject = data["content"].get("subject", "")
        return Taken(recipients, subject, [transmission], json_answer(200, {"results": results}))

    def error_body(self, status: int, known: Any) -> Any:
        return _sparkpost_error(*(known if isinstance(known, tuple) else (f"1{status}", known)))


def _unisender_go_error(code: int, message: str) -> Any:
    return {"status": "error", "code": code, "message": message}


class UnisenderGo(Provider):
    name = "Unisender Go"
    api_path = "/ru/transactional/api/v1/"
    paths = re.compile(r"/(?:.+/)?(email/send\.json)")  # the API's host and path differ from account to account
    key_header = "x-api-key"
    # https://godocs.unisender.ru/web-api-ref
    errors = {
        400: (102, "Error in request: from_email is required"),
        (400, "duplicate"): (1573, "The message with this idempotence_key was already accepted"),
        (400, "recipients"): (204, "No valid recipients"),
        (400, "quota"): (906, "The limit of the account is reached"),
        401: (114, "Can not decode or find the API key"),
        402: (902, "Not enough money on the account"),
        403: (104, "Access forbidden"),
        (403, "quota"): (901, "The daily limit is reached"),
        404: (4, "Unknown method"),
        413: (147, "The request is too large"),
        429: (152, "Too many requests"),
        500: (150, "Unknown internal error"),
        (500, "permanent"): (120, "The request cannot be executed"),
    }
    # It compares keys only. What it says while the first request is still under way is not known.
    _duplicate = json_answer(400, _unisender_go_error(*errors[400, "duplicate"]))
    keys = KeyRules(
        window=60,
        grammar=re.compile(r".{1,64}"),
        invalid=json_answer(400, _unisender_go_error(1572, "idempotence_key is too long")),
        in_progress=_duplicate,
        duplicate=_duplicate,
    )

    def idempotency_key(self, request: Request, data: Any) -> str | None:
        key = data["message"].get("idempotence_key")
        return None if key is None else str(key)

    def take(self, endpoint: str, data: Any, ids: Ids) -> Taken:
        recipients = addresses(data["message"]["recipients"])
        job_id = str(ids())
        # Each address once: it sends to the first of equal ones only.
        emails = list(dict.fromkeys(recipients))
        answer = json_answer(200, {"status": "success", "job_id": job_id, "emails": emails})
        return Taken(emails, data["message"].get("subject", ""), [job_id], answer)

    def error_body(self, status: int, known: Any) -> Any:
        return _unisender_go_error(*(known if isinstance(known, tuple) else (150, known)))


PROVIDERS: dict[str, type[Provider]] = {
    "brevo": Brevo,
    "mailersend": MailerSend,
    "mailgun": Mailgun,
    "mailjet": Mailjet,
    "mailtrap": Mailtrap,
    "mandrill": Mandrill,
    "postal": Postal,
    "postmark": Postmark,
    "resend": Resend,
    "scaleway": Scaleway,
    "sendgrid": SendGrid,
    "sparkpost": SparkPost,
    "unisender_go": UnisenderGo,
}
