"""What callers send, checked: bodies and query parameters."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from mover.core.errors import InvalidRequest
from mover.core.ids import TenantId, Tier
from mover.core.migration import MigrationRequest
from mover.core.states import Status
from mover.web.errors import InvalidBody, MalformedBody

MAX_BODY_BYTES = 64 * 1024
MAX_LIMIT = 500


class Submission(BaseModel):
    """The body of `POST /api/platform/migrations`."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", strict=True, frozen=True)

    tenant_id: UUID
    target_vertical: str = Field(min_length=1, max_length=63)
    target_tier: Tier
    scheduled_at: AwareDatetime | None = None
    priority: int = Field(default=0, ge=-1000, le=1000)
    reason: str | None = Field(default=None, max_length=1000, pattern=r"^[^\x00]*$")
    auto_approve: bool = True
    dry_run: bool = False

    def request(self, requested_by: str) -> MigrationRequest:
        return MigrationRequest(
            tenant=TenantId(self.tenant_id),
            target_vertical=self.target_vertical,
            target_tier=self.target_tier,
            scheduled_at=self.scheduled_at,
            priority=self.priority,
            reason=self.reason,
            requested_by=requested_by,
        )


def parse_submission(body: bytes) -> Submission:
    """Raises MalformedBody, or InvalidBody with every wrong field."""
    try:
        submission = Submission.model_validate_json(body)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        if any(detail["type"] == "json_invalid" for detail in details):
            raise MalformedBody("the body is not JSON") from None
        fields = [
            {"field": ".".join(map(str, detail["loc"])) or "body", "message": detail["msg"]}
            for detail in details
        ]
        raise InvalidBody("the body is not a migration request", fields=fields) from None
    if not submission.auto_approve:
        raise InvalidRequest("approval is not available in this version: leave it out", field="autoApprove")
    return submission


def parse_listing(query: Mapping[str, str]) -> tuple[Status | None, int]:
    """`status` and `limit`; raises InvalidRequest."""
    status = query.get("status")
    if status is not None and status not in tuple(Status):
        raise InvalidRequest(f"should be one of {', '.join(Status)}", field="status")
    limit = query.get("limit", "50")
    if not (limit.isascii() and limit.isdigit() and len(limit) < 9 and 1 <= int(limit) <= MAX_LIMIT):
        raise InvalidRequest(f"should be a whole number from 1 to {MAX_LIMIT}", field="limit")
    return Status(status) if status else None, int(limit)
