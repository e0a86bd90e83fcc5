"""What each back end knows of its ESP: sane as facts, and right about the answers that the ESPs really give."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest

import anymail_retry.backends
from anymail_retry.exceptions import InvalidIdempotencyKey
from anymail_retry.idempotency import IdempotencyKey
from anymail_retry.verdict import IN_PROGRESS, Answer, AnswerRule, EspFacts, Verdict, judge_answer

DELIVERED, REFUSED, AMBIGUOUS = Verdict.DELIVERED, Verdict.REFUSED, Verdict.AMBIGUOUS
BLOCKED, PERMANENT = Verdict.BLOCKED, Verdict.PERMANENT

BACKENDS: dict[str, type[EspFacts]] = {
    module: getattr(anymail_retry.backends, name) for name, module in anymail_retry.backends.BACKENDS.items()
}


def rules(facts: type[EspFacts]) -> list[AnswerRule]:
    key = facts.idempotency
    return [*facts.answers, *(rule for rule in (key and key.duplicate, key and key.conflict) if rule)]


# --- Sane as facts ---


@pytest.mark.parametrize("esp", BACKENDS)
def test_no_accepted_or_redirected_request_is_ever_tried_again_by_its_status(esp: str) -> None:
    facts = BACKENDS[esp]
    statuses = facts.refused_statuses | facts.ambiguous_statuses | facts.blocked_statuses
    assert statuses
    assert all(400 <= status <= 599 for status in statuses)


@pytest.mark.parametrize("esp", BACKENDS)
def test_what_the_esp_says_of_the_account_is_never_tried_again_in_the_call(esp: str) -> None:
    facts = BACKENDS[esp]
    assert not facts.blocked_statuses & (facts.refused_statuses | facts.ambiguous_statuses)


@pytest.mark.parametrize("esp", BACKENDS)
def test_every_esp_refuses_with_429_and_with_a_wrong_api_key(esp: str) -> None:
    facts = BACKENDS[esp]
    assert 429 in facts.refused_statuses
    assert 401 in facts.blocked_statuses


@pytest.mark.parametrize("esp", BACKENDS)
def test_no_rule_takes_an_answer_for_a_delivery(esp: str) -> None:
    """Whether a 2xx is a delivery is Anymail's parser's to say."""
    facts = BACKENDS[esp]
    assert all(rule.verdict is not DELIVERED for rule in facts.answers)
    assert facts.none_accepted is not DELIVERED


@pytest.mark.parametrize("esp", BACKENDS)
def test_every_rule_asks_for_more_than_a_status(esp: str) -> None:
    """A bare status belongs into the sets of statuses, where the retry policy looks."""
    assert all(rule.path or rule.text for rule in rules(BACKENDS[esp]))


@pytest.mark.parametrize("esp", BACKENDS)
def test_a_rule_for_a_2xx_says_that_it_is_a_refusal(esp: str) -> None:
    for rule in BACKENDS[esp].answers:
        if rule.status is not None and rule.status < 300:
            assert rule.verdict in (REFUSED, BLOCKED, PERMANENT)
            assert rule.values or rule.unless or rule.text


@pytest.mark.parametrize("esp", BACKENDS)
def test_the_facts_are_immutable_since_all_instances_share_them(esp: str) -> None:
    facts = BACKENDS[esp]
    for name in ("refused_statuses", "ambiguous_statuses", "blocked_statuses"):
        assert isinstance(getattr(facts, name), frozenset)
    assert isinstance(facts.answers, tuple)


def test_the_esps_with_keys_are_those_four() -> None:
    assert {esp for esp, facts in BACKENDS.items() if facts.idempotency} == {
        "brevo",
        "resend",
        "sparkpost",
        "unisender_go",
    }


@pytest.mark.parametrize(
    ("esp", "window", "compares_body"),
    [
        pytest.param("brevo", 15 * 60, False, id="Brevo: the shorter of its two documented times"),
        pytest.param("resend", 24 * 3600, True, id="Resend"),
        pytest.param("sparkpost", 24 * 3600, True, id="SparkPost"),
        pytest.param("unisender_go", 60, False, id="Unisender Go"),
    ],
)
def test_a_key_is_remembered_so_long_and_a_repeated_body_must_be_equal_or_not(
    esp: str, window: float, compares_body: bool
) -> None:
    key = BACKENDS[esp].idempotency
    assert key is not None
    assert key.window == window
    assert key.compares_body is compares_body
    # Without a replay of the first answer there has to be an answer that says "duplicate", and the other way round.
    assert (key.duplicate is None) is compares_body
    assert (key.conflict is None) is not compares_body


# --- The grammar of keys ---

UUID = "c5f0e3a1-7d3b-4c0e-9a53-0a2b6f4d8e11"


class Grammar(NamedTuple):
    esp: str
    key: str
    taken: bool


GRAMMARS = [
    *(pytest.param(Grammar(esp, UUID, True), id=f"{esp}: a UUID in text") for esp in ("brevo", "resend")),
    *(pytest.param(Grammar(esp, UUID, True), id=f"{esp}: a UUID in text") for esp in ("sparkpost", "unisender_go")),
    pytest.param(Grammar("brevo", UUID.upper(), True), id="brevo: a UUID in capitals"),
    pytest.param(Grammar("brevo", UUID.replace("-", ""), False), id="brevo: a UUID without dashes"),
    pytest.param(Grammar("brevo", "order-17", False), id="brevo: anything but a UUID"),
    pytest.param(Grammar("brevo", f"{UUID}\n", False), id="brevo: a UUID and a line's end"),
    pytest.param(Grammar("resend", "order/17: first reminder", True), id="resend: any visible text"),
    pytest.param(Grammar("resend", "x" * 256, True), id="resend: the longest"),
    pytest.param(Grammar("resend", "x" * 257, False), id="resend: too long"),
    pytest.param(Grammar("resend", "", False), id="resend: empty"),
    pytest.param(Grammar("resend", " order", False), id="resend: a blank that the header would lose"),
    pytest.param(Grammar("resend", "order\r\nX-Header: injected", False), id="resend: a line break in a header"),
    pytest.param(Grammar("resend", "beställning", False), id="resend: what a header cannot carry"),
    pytest.param(Grammar("sparkpost", "order_17.first-reminder", True), id="sparkpost: its characters"),
    pytest.param(Grammar("sparkpost", "order/17", False), id="sparkpost: none of its characters"),
    pytest.param(Grammar("sparkpost", "x" * 255, True), id="sparkpost: the longest"),
    pytest.param(Grammar("sparkpost", "x" * 256, False), id="sparkpost: too long"),
    pytest.param(Grammar("unisender_go", "beställning 17", True), id="unisender_go: any text"),
    pytest.param(Grammar("unisender_go", "x" * 64, True), id="unisender_go: the longest"),
    pytest.param(Grammar("unisender_go", "x" * 65, False), id="unisender_go: too long"),
]


@pytest.mark.parametrize("case", GRAMMARS)
def test_a_key_is_checked_by_the_esps_grammar(case: Grammar) -> None:
    key = BACKENDS[case.esp].idempotency
    assert isinstance(key, IdempotencyKey)
    if case.taken:
        key.check(case.key)
    else:
        with pytest.raises(InvalidIdempotencyKey, match="grammar"):
            key.check(case.key)


# --- What each ESP answers, and what it means ---


class Case(NamedTuple):
    esp: str
    status: int
    body: Any
    verdict: Verdict
    reason: str = ""
    phrase: str = ""


def case(esp: str, status: int, body: Any, verdict: Verdict, reason: str = "", *, why: str, phrase: str = "") -> Any:
    return pytest.param(Case(esp, status, body, verdict, reason, phrase), id=f"{esp} {status}: {why}")


PAGE = "<html><head><title>503 Service Unavailable</title></head></html>"

BREVO = [
    case("brevo", 201, {"messageId": "<1@smtp-relay.mailin.fr>"}, DELIVERED, why="accepted"),
    case("brevo", 400, {"code": "invalid_parameter", "message": "valid sender email required"}, PERMANENT, why="wrong"),
    case(
        "brevo", 400, {"code": "not_enough_credits", "message": "Not enough credits"}, BLOCKED, "account", why="credits"
    ),
    case(
        "brevo", 402, {"code": "not_enough_credits", "message": "Not enough credits"}, BLOCKED, "account", why="credits"
    ),
    case(
        "brevo",
        400,
        {"code": "account_under_validation", "message": "Account under validation"},
        BLOCKED,
        "account",
        why="validation",
    ),
    case(
        "brevo",
        403,
        {"code": "permission_denied", "message": "Unable to send email. Your SMTP account is not yet activated."},
        BLOCKED,
        "account",
        why="not activated",
    ),
    case("brevo", 401, {"code": "unauthorized", "message": "Key not found"}, BLOCKED, why="wrong key"),
    case("brevo", 429, "", REFUSED, why="rate"),
    case("brevo", 500, {"code": "unknown", "message": "Internal error"}, AMBIGUOUS, why="internal error"),
    # By itself, without the history that makes a success of it:
    case(
        "brevo",
        400,
        {"code": "duplicate_parameter", "message": "Email for the idempotency key has already been processed"},
        PERMANENT,
        why="duplicate",
    ),
]

MAILERSEND = [
    case("mailersend", 202, "", DELIVERED, why="accepted"),
    case(
        "mailersend",
        429,
        {"message": "Your account reached its rate limit of 120 requests/min. #MS42903"},
        REFUSED,
        why="rate",
    ),
    case(
        "mailersend",
        429,
        {"message": "Your account reached its API daily quota limit. #MS42901"},
        BLOCKED,
        "quota",
        why="daily quota",
    ),
    case(
        "mailersend",
        422,
        {"message": "Your trial domain reached its email quota limit. #MS42222", "errors": {}},
        BLOCKED,
        "quota",
        why="quota of a trial",
    ),
    case(
        "mailersend",
        422,
        {"message": "The given data was invalid.", "errors": {"from.email": ["must be verified. #MS42207"]}},
        PERMANENT,
        why="wrong From",
    ),
    case("mailersend", 403, {"message": "This action is unauthorized. #MS40301"}, BLOCKED, "api key", why="scope"),
    case("mailersend", 401, {"message": "Unauthenticated."}, BLOCKED, why="wrong key"),
    case("mailersend", 421, {"message": "Service isn't available, try again later"}, REFUSED, why="maintenance"),
    case("mailersend", 503, {"message": "Service Unavailable"}, REFUSED, why="maintenance"),
    case("mailersend", 504, PAGE, AMBIGUOUS, why="the edge gave up waiting"),
    case("mailersend", 408, "", AMBIGUOUS, why="timeout"),
]

MAILGUN = [
    case("mailgun", 200, {"id": "<1@example.com>", "message": "Queued. Thank you."}, DELIVERED, why="accepted"),
    case("mailgun", 200, "Mailgun Magnificent API", BLOCKED, "wrong URL", why="its greeting"),
    case("mailgun", 401, "Forbidden", BLOCKED, why="wrong key"),
    case("mailgun", 404, {"message": "Domain not found: example.com"}, PERMANENT, why="wrong sender domain"),
    case("mailgun", 400, {"message": "'to' parameter is not a valid address."}, PERMANENT, why="wrong address"),
    case(
        "mailgun",
        420,
        {"message": "Domain example.com is not allowed to send: recipient limit exceeded, try again after Mon"},
        BLOCKED,
        "account",
        why="recipient limit",
    ),
    case("mailgun", 420, "", BLOCKED, why="recipient limit, unreadable"),
    case(
        "mailgun",
        403,
        {"message": "Domain example.com is not allowed to send: Your account is temporarily disabled."},
        BLOCKED,
        "account",
        why="disabled account",
    ),
    case(
        "mailgun",
        403,
        {
            "message": "Domain sandbox1.mailgun.org is not allowed to send: Sandbox subdomains are for test purposes"
            " only. Please add your own domain or add the address to authorized recipients in Account Settings."
        },
        PERMANENT,
        "sandbox",
        why="sandbox, other recipient",
    ),
    case("mailgun", 429, {"message": "Too many requests"}, REFUSED, why="rate"),
    case("mailgun", 500, {"message": "Internal Server Error"}, AMBIGUOUS, why="was seen though the mail arrived"),
]

MAILJET_ERROR = {"ErrorCode": "mj-0013", "ErrorMessage": "An address is invalid.", "ErrorRelatedTo": ["To[0].Email"]}

MAILJET = [
    case("mailjet", 200, {"Messages": [{"Status": "success", "To": []}]}, DELIVERED, why="accepted"),
    case(
        "mailjet",
        400,
        {"Messages": [{"Status": "error", "Errors": [{**MAILJET_ERROR, "StatusCode": 400}]}]},
        PERMANENT,
        why="every message wrong",
    ),
    case(
        "mailjet",
        400,
        {"Messages": [{"Status": "error", "Errors": [{**MAILJET_ERROR, "StatusCode": 500}]}]},
        REFUSED,
        "no recipient accepted",
        why="every message failed there",
    ),
    case(
        "mailjet",
        400,
        {
            "Messages": [
                {"Status": "error", "Errors": [{**MAILJET_ERROR, "StatusCode": 500}]},
                {"Status": "error", "Errors": [{**MAILJET_ERROR, "StatusCode": 400}]},
            ]
        },
        PERMANENT,
        why="one failed there, one is wrong",
    ),
    case(
        "mailjet",
        400,
        {
            "Messages": [
                {"Status": "error", "Errors": [{**MAILJET_ERROR, "StatusCode": 500}]},
                {"Status": "success", "To": []},
            ]
        },
        PERMANENT,
        why="one was sent: never again",
    ),
    case(
        "mailjet",
        401,
        {"ErrorCode": "mj-0002", "StatusCode": 401, "ErrorMessage": "API key authentication/authorization failure."},
        BLOCKED,
        why="wrong key",
    ),
    case("mailjet", 429, "<html><title>429 Too Many Requests</title></html>", REFUSED, why="rate, as a page"),
    case("mailjet", 500, "", AMBIGUOUS, why="internal error"),
    case(
        "mailjet",
        500,
        "",
        PERMANENT,
        "merge data",
        why="null in merge data",
        phrase="Cannot convert data from Null value",
    ),
]

MAILTRAP = [
    case("mailtrap", 200, {"success": True, "message_ids": ["1"]}, DELIVERED, why="accepted"),
    case("mailtrap", 400, {"success": False, "errors": ["'from' is required"]}, PERMANENT, why="wrong"),
    case("mailtrap", 401, {"success": False, "errors": ["Unauthorized"]}, BLOCKED, why="wrong key"),
    case("mailtrap", 429, {"success": False, "errors": ["Rate limit exceeded"]}, REFUSED, why="rate"),
    case(
        "mailtrap",
        429,
        {"success": False, "errors": ["The email limit is reached. Please upgrade your plan https://mailtrap.io/x"]},
        BLOCKED,
        "quota",
        why="plan used up",
    ),
    case("mailtrap", 429, {"errors": ["Billing plan limit exhausted"]}, BLOCKED, "quota", why="plan, as specified"),
    case("mailtrap", 500, {"success": False, "errors": ["Internal error"]}, AMBIGUOUS, why="internal error"),
]


def mandrill(name: str) -> dict[str, Any]:
    return {"status": "error", "code": -99, "name": name, "message": "..."}


MANDRILL = [
    case("mandrill", 200, [{"email": "to@example.com", "status": "sent", "_id": "1"}], DELIVERED, why="accepted"),
    case("mandrill", 401, mandrill("Invalid_Key"), BLOCKED, "account", why="wrong key"),
    case("mandrill", 500, mandrill("Invalid_Key"), BLOCKED, "account", why="wrong key, as until 2023"),
    case("mandrill", 402, mandrill("PaymentRequired"), BLOCKED, "account", why="payment"),
    case("mandrill", 404, mandrill("Unknown_Template"), PERMANENT, why="no such template"),
    case("mandrill", 500, mandrill("ValidationError"), PERMANENT, why="wrong, as until 2023"),
    case("mandrill", 500, mandrill("GeneralError"), AMBIGUOUS, why="internal error"),
    case("mandrill", 500, PAGE, AMBIGUOUS, why="internal error as a page"),
    case("mandrill", 500, mandrill("ServiceUnavailable"), REFUSED, why="maintenance, as until 2023"),
    case("mandrill", 503, mandrill("ServiceUnavailable"), REFUSED, why="maintenance"),
    case("mandrill", 429, mandrill("RequestLimitExceeded"), REFUSED, why="rate"),
]


def postal(status: str, **data: Any) -> dict[str, Any]:
    return {"status": status, "time": 0.01, "flags": {}, "data": data}


POSTAL = [
    case("postal", 200, postal("success", messages={"to@example.com": {"id": 1}}), DELIVERED, why="accepted"),
    case("postal", 200, postal("error", code="InvalidServerAPIKey", token="k"), BLOCKED, "account", why="wrong key"),
    case("postal", 200, postal("error", code="AccessDenied"), BLOCKED, "account", why="no key"),
    case("postal", 200, postal("error", code="ServerSuspended"), BLOCKED, "account", why="suspended"),
    case("postal", 200, postal("error", code="UnauthenticatedFromAddress"), PERMANENT, "refused", why="wrong From"),
    case("postal", 200, postal("error", code="NoRecipients"), PERMANENT, "refused", why="no recipients"),
    case("postal", 200, postal("parameter-error", message="..."), PERMANENT, "refused", why="wrong parameter"),
    case("postal", 502, PAGE, AMBIGUOUS, why="the proxy's"),
    case("postal", 503, PAGE, AMBIGUOUS, why="the proxy's, which may have passed it on"),
    case("postal", 429, PAGE, REFUSED, why="the proxy's rate"),
]


def postmark(code: int, message: str = "...") -> dict[str, Any]:
    return {"ErrorCode": code, "Message": message}


POSTMARK = [
    case("postmark", 200, {**postmark(0, "OK"), "MessageID": "1", "To": "to@example.com"}, DELIVERED, why="accepted"),
    case("postmark", 200, {"Message": "Message accepted, but delivery may be delayed."}, DELIVERED, why="delayed"),
    case("postmark", 200, postmark(405), BLOCKED, "account", why="a refusal: out of credits"),
    case("postmark", 200, postmark(300), PERMANENT, "refused", why="a refusal: wrong request"),
    case("postmark", 422, postmark(405), BLOCKED, "account", why="out of credits"),
    case("postmark", 422, postmark(412), BLOCKED, "account", why="account pending"),
    case("postmark", 422, postmark(413), BLOCKED, "account", why="account may not send"),
    case("postmark", 422, postmark(406), PERMANENT, why="inactive recipient"),
    case("postmark", 422, postmark(500), PERMANENT, why="500 is a signature's error there"),
    case("postmark", 422, postmark(503), PERMANENT, why="503 is a signature's error there"),
    case("postmark", 422, postmark(100), REFUSED, why="maintenance"),
    case("postmark", 422, postmark(429), REFUSED, why="rate, by ErrorCode"),
    case("postmark", 429, "", REFUSED, why="rate"),
    case("postmark", 503, PAGE, REFUSED, why="planned outage"),
    case("postmark", 401, postmark(10), BLOCKED, why="wrong key"),
    case("postmark", 500, "", AMBIGUOUS, why="internal error"),
    case("postmark", 200, [postmark(0, "OK"), postmark(0, "OK")], DELIVERED, why="batch accepted"),
    case("postmark", 200, [postmark(0, "OK"), postmark(405)], DELIVERED, why="batch, in part"),
    case("postmark", 200, [{"Message": "delivery may be delayed"}, postmark(405)], DELIVERED, why="batch, one late"),
    case("postmark", 200, [postmark(405), postmark(405)], BLOCKED, "account", why="batch out of credits"),
    case("postmark", 200, [postmark(429), postmark(100)], REFUSED, why="batch over the rate"),
    case("postmark", 200, [postmark(429), postmark(405)], BLOCKED, "account", why="batch out of credits at its end"),
    case("postmark", 200, [postmark(300), postmark(405)], PERMANENT, "refused", why="batch, all refused"),
    case("postmark", 200, [], DELIVERED, why="batch of nothing: the parser's to tell"),
]


def resend(status: int, name: str, message: str = "...") -> dict[str, Any]:
    return {"statusCode": status, "name": name, "message": message}


RESEND = [
    case("resend", 200, {"id": "1"}, DELIVERED, why="accepted"),
    case("resend", 429, resend(429, "rate_limit_exceeded"), REFUSED, why="rate"),
    case("resend", 429, resend(429, "daily_quota_exceeded"), BLOCKED, "quota", why="daily quota"),
    case("resend", 429, resend(429, "monthly_quota_exceeded"), BLOCKED, "quota", why="monthly quota"),
    case("resend", 409, resend(409, "concurrent_idempotent_requests"), REFUSED, IN_PROGRESS, why="in progress"),
    case("resend", 409, resend(409, "invalid_idempotent_request"), PERMANENT, why="key with another body"),
    case("resend", 400, resend(400, "invalid_idempotency_key"), PERMANENT, why="wrong key"),
    case("resend", 401, resend(401, "missing_api_key"), BLOCKED, why="no API key"),
    case("resend", 403, resend(403, "invalid_api_key"), BLOCKED, "api key", why="wrong API key, as documented"),
    case("resend", 400, resend(400, "validation_error", "API key is invalid"), BLOCKED, "api key", why="wrong API key"),
    case(
        "resend",
        403,
        resend(403, "validation_error", "The example.com domain is not verified."),
        PERMANENT,
        why="wrong From",
    ),
    case("resend", 422, resend(422, "missing_required_field"), PERMANENT, why="wrong"),
    case("resend", 451, resend(451, "security_error"), PERMANENT, why="security"),
    case("resend", 500, resend(500, "application_error"), AMBIGUOUS, why="internal error"),
    case("resend", 503, PAGE, AMBIGUOUS, why="load balancer"),
    case("resend", 520, PAGE, AMBIGUOUS, why="edge"),
]

SCALEWAY = [
    case("scaleway", 200, {"emails": [{"id": "1", "status": "new"}]}, DELIVERED, why="accepted"),
    case(
        "scaleway",
        429,
        {"type": "too_many_requests", "limit": {"quota": 3, "window_seconds": 60}, "reset_seconds": 13},
        REFUSED,
        why="rate",
    ),
    case(
        "scaleway",
        403,
        {"type": "quotas_exceeded", "details": [{"resource": "emails", "quota": 300, "current": 300}]},
        BLOCKED,
        "quota",
        why="quota",
    ),
    case("scaleway", 403, {"type": "permissions_denied", "details": []}, BLOCKED, "api key", why="API key's rights"),
    case("scaleway", 401, {"type": "denied_authentication", "method": "api_key"}, BLOCKED, why="wrong API key"),
    case("scaleway", 409, {"type": "transient_state", "resource": "domain"}, REFUSED, why="being changed"),
    case("scaleway", 409, {"type": "conflict", "message": "..."}, PERMANENT, why="another conflict"),
    case("scaleway", 400, {"type": "invalid_arguments", "details": []}, PERMANENT, why="wrong"),
    case("scaleway", 500, PAGE, AMBIGUOUS, why="internal error"),
]


def sendgrid(message: str) -> dict[str, Any]:
    return {"errors": [{"message": message, "field": None, "help": None}]}


SENDGRID = [
    case("sendgrid", 202, "", DELIVERED, why="accepted"),
    case("sendgrid", 401, sendgrid("Maximum credits exceeded"), BLOCKED, why="credits"),
    case("sendgrid", 403, sendgrid("access forbidden"), BLOCKED, "api key", why="API key's rights"),
    case(
        "sendgrid",
        403,
        sendgrid("The from address does not match a verified Sender Identity."),
        PERMANENT,
        why="wrong From",
    ),
    case("sendgrid", 429, sendgrid("too many requests"), REFUSED, why="rate"),
    case("sendgrid", 413, sendgrid("too large"), PERMANENT, why="too large"),
    case("sendgrid", 500, sendgrid("Internal Server Error"), AMBIGUOUS, why="internal error"),
]


def sparkpost(code: Any, message: str = "...") -> dict[str, Any]:
    return {"errors": [{"message": message, "code": code}]}


SPARKPOST = [
    case("sparkpost", 200, {"results": {"total_accepted_recipients": 1}}, DELIVERED, why="accepted"),
    case("sparkpost", 420, sparkpost("2102", "Exceed Sending Limit"), BLOCKED, why="sending limit"),
    case("sparkpost", 429, sparkpost("1429"), REFUSED, why="rate"),
    case("sparkpost", 503, PAGE, REFUSED, why="try later"),
    case("sparkpost", 409, sparkpost("1601"), REFUSED, IN_PROGRESS, why="in progress"),
    case("sparkpost", 409, sparkpost(1601), REFUSED, IN_PROGRESS, why="in progress, as a number"),
    case("sparkpost", 409, sparkpost("1600"), PERMANENT, why="key with another body"),
    case("sparkpost", 403, {"errors": [{"message": "Forbidden."}]}, BLOCKED, "api key", why="plan or API key"),
    case("sparkpost", 403, {"errors": [{"message": "Something else."}]}, PERMANENT, why="in other words"),
    case("sparkpost", 403, PAGE, PERMANENT, why="who knows whose"),
    case("sparkpost", 400, sparkpost("7001", "Unconfigured Sending Domain"), PERMANENT, why="wrong From"),
    case("sparkpost", 422, sparkpost("1400", "required field is missing"), PERMANENT, why="wrong"),
    case("sparkpost", 500, sparkpost("1500"), AMBIGUOUS, why="internal error"),
]


def unisender_go(code: int) -> dict[str, Any]:
    return {"status": "error", "code": code, "message": "..."}


UNISENDER_GO = [
    case("unisender_go", 200, {"status": "success", "emails": ["to@example.com"]}, DELIVERED, why="accepted"),
    case("unisender_go", 500, unisender_go(150), AMBIGUOUS, why="unknown error"),
    case("unisender_go", 500, unisender_go(120), PERMANENT, why="DKIM"),
    case("unisender_go", 500, unisender_go(908), PERMANENT, why="no project"),
    *(case("unisender_go", 403, unisender_go(n), BLOCKED, "quota", why=f"limit {n}") for n in (901, 902, 904, 905)),
    case("unisender_go", 400, unisender_go(906), BLOCKED, "quota", why="limit 906"),
    case("unisender_go", 403, unisender_go(106), BLOCKED, "account", why="user inactive"),
    case("unisender_go", 403, unisender_go(903), PERMANENT, why="free tariff, other recipient"),
    case("unisender_go", 401, unisender_go(114), BLOCKED, why="wrong host"),
    case("unisender_go", 400, unisender_go(204), PERMANENT, "recipients refused", why="no recipient"),
    case("unisender_go", 400, unisender_go(1573), PERMANENT, why="duplicate, by itself"),
    case("unisender_go", 429, unisender_go(0), REFUSED, why="rate"),
    case("unisender_go", 502, PAGE, AMBIGUOUS, why="internal error"),
]


def ses(code: str, message: str = "...") -> dict[str, Any]:
    return {"Error": {"Code": code, "Message": message}, "message": message}


def ses_bulk(*statuses: str) -> dict[str, Any]:
    return {"BulkEmailEntryResults": [{"Status": status} for status in statuses]}


AMAZON_SES = [
    case("amazon_ses", 200, {"MessageId": "1"}, DELIVERED, why="accepted"),
    case("amazon_ses", 429, ses("TooManyRequestsException"), REFUSED, why="rate"),
    case("amazon_ses", 400, ses("ThrottlingException", "Maximum sending rate exceeded."), REFUSED, why="sending rate"),
    case(
        "amazon_ses",
        400,
        ses("Throttling", "Daily message quota exceeded."),
        BLOCKED,
        "quota",
        why="daily quota",
    ),
    case("amazon_ses", 400, ses("SendingPausedException"), BLOCKED, "account", why="paused"),
    case("amazon_ses", 400, ses("AccountSuspendedException"), BLOCKED, "account", why="suspended"),
    case("amazon_ses", 403, ses("UnrecognizedClientException"), BLOCKED, "credentials", why="wrong key"),
    case("amazon_ses", 403, ses("AccessDeniedException"), BLOCKED, "credentials", why="no right"),
    case("amazon_ses", 400, ses("MessageRejected", "Email address is not verified."), PERMANENT, why="rejected"),
    case("amazon_ses", 404, ses("NotFoundException"), PERMANENT, why="no template"),
    case("amazon_ses", 503, ses("ServiceUnavailable"), REFUSED, why="unavailable"),
    case("amazon_ses", 503, ses("503", "Service Unavailable"), AMBIGUOUS, why="the load balancer's"),
    case("amazon_ses", 500, ses("InternalServiceErrorException"), AMBIGUOUS, why="internal error"),
    case("amazon_ses", 200, ses_bulk("SUCCESS", "FAILED"), DELIVERED, why="bulk, in part"),
    case(
        "amazon_ses",
        200,
        ses_bulk("TRANSIENT_FAILURE", "ACCOUNT_THROTTLED"),
        REFUSED,
        "no recipient accepted",
        why="bulk, later",
    ),
    case(
        "amazon_ses",
        200,
        ses_bulk("ACCOUNT_THROTTLED", "ACCOUNT_DAILY_QUOTA_EXCEEDED"),
        BLOCKED,
        "account",
        why="bulk, daily quota",
    ),
    case(
        "amazon_ses",
        200,
        ses_bulk("FAILED", "MESSAGE_REJECTED"),
        PERMANENT,
        "no recipient accepted",
        why="bulk, never",
    ),
]

ANSWERS = [
    *BREVO,
    *MAILERSEND,
    *MAILGUN,
    *MAILJET,
    *MAILTRAP,
    *MANDRILL,
    *POSTAL,
    *POSTMARK,
    *RESEND,
    *SCALEWAY,
    *SENDGRID,
    *SPARKPOST,
    *UNISENDER_GO,
    *AMAZON_SES,
]


@pytest.mark.parametrize("case", ANSWERS)
def test_an_answer_means(case: Case) -> None:
    body = case.body.encode() if isinstance(case.body, str) else json.dumps(case.body).encode()
    answer = Answer(case.status, body, phrase=case.phrase)
    assert judge_answer(answer, BACKENDS[case.esp]) == (case.verdict, case.reason)


def test_every_back_end_is_in_the_table() -> None:
    assert {row.values[0].esp for row in ANSWERS} == set(BACKENDS)


@pytest.mark.parametrize("esp", BACKENDS)
def test_every_rule_is_met_by_an_answer_of_the_table(esp: str) -> None:
    """A rule that no real answer reaches is either dead or untested."""
    answers = [
        Answer(
            row.status, (row.body if isinstance(row.body, str) else json.dumps(row.body)).encode(), phrase=row.phrase
        )
        for row in (param.values[0] for param in ANSWERS)
        if row.esp == esp
    ]
    first_matches = {next((rule for rule in BACKENDS[esp].answers if rule.matches(answer)), None) for answer in answers}
    assert set(BACKENDS[esp].answers) <= first_matches


def test_unknown_esp_gets_the_defaults() -> None:
    assert judge_answer(Answer(429), EspFacts) == (REFUSED, "")
    assert judge_answer(Answer(503), EspFacts) == (AMBIGUOUS, "")
    assert judge_answer(Answer(599), EspFacts) == (AMBIGUOUS, "")
    assert judge_answer(Answer(402), EspFacts) == (BLOCKED, "")
    assert judge_answer(Answer(403), EspFacts) == (PERMANENT, "")
    assert judge_answer(Answer(302), EspFacts) == (PERMANENT, "")
    assert judge_answer(Answer(204), EspFacts) == (DELIVERED, "")
