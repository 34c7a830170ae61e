"""GET /v1/models, /health and /metrics: what is served, whether it is well, how busy it is."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from .http_support import OBJECT, TEXT, documented, service_of
from .options import TttOptions
from .service import Service

router = APIRouter()


@router.get("/v1/models", responses=documented())
async def models(request: Request) -> dict[str, Any]:
    """List the one model there is."""
    return {"object": "list", "data": [_model(service_of(request))]}


@router.get("/v1/models/{name:path}", responses=documented(404))
async def model(request: Request, name: str) -> dict[str, Any]:
    """Tell of a model."""
    service = service_of(request)
    service.check_model(name)
    return _model(service)


@router.head("/health", include_in_schema=False)
@router.get(
    "/health",
    responses={
        **documented(),
        503: {"description": "It stops, or has failed.", "content": {"application/json": {"schema": OBJECT}}},
    },
    openapi_extra={"security": []},
)
async def health(request: Request) -> Response:
    """Tell whether requests are answered: 200, or 503 while the server stops or when its engine has died."""
    service = service_of(request)
    status = "draining" if service.is_draining else "ok" if service.engine.is_running else "failed"
    return JSONResponse({"status": status, "model": service.model_name}, 200 if status == "ok" else 503)


@router.get("/metrics", response_class=Response, responses=documented(kinds={"text/plain": TEXT}))
async def metrics(request: Request) -> Response:
    """Give all figures in Prometheus' text format."""
    return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _model(service: Service) -> dict[str, Any]:
    """What OpenAI's clients read and, under `ttt`, what there is to choose from in a request's field of that name."""
    config = service.engine.model.generation_config
    defaults = {name: getattr(config, name, None) for name in TttOptions.model_fields if name not in ("task", "seed")}
    choices = {"tasks": list(service.processor.tasks), "defaults": defaults}
    return {"id": service.model_name, "object": "model", "created": service.created, "owned_by": "ttt", "ttt": choices}
