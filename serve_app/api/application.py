"""The HTTP application, declared in one place: operations, routes, middleware, error handlers."""

from importlib.metadata import version

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from serve_app.api.endpoints.annotate import AnnotateRequest, annotate
from serve_app.api.endpoints.annotators_list import AnnotatorsAnswer, annotators_list
from serve_app.api.endpoints.controlnet import ControlNetRequest, controlnet
from serve_app.api.endpoints.fetch import FetchRequest, fetch
from serve_app.api.endpoints.files import file_routes
from serve_app.api.endpoints.get_all_models import ModelsAnswer, get_all_models
from serve_app.api.endpoints.health import health_routes
from serve_app.api.endpoints.jobs import CancelAnswer, JobAnswer, JobsAnswer, cancel_job, job_state, jobs_list
from serve_app.api.endpoints.schedulers_list import SchedulersAnswer, schedulers_list
from serve_app.api.endpoints.system_details import SystemAnswer, system_details
from serve_app.api.endpoints.verify_model import VerifyModelAnswer, VerifyModelRequest, verify_model
from serve_app.api.envelopes import HANDLERS, FailedAnswer, LastResort, ProcessingAnswer, SuccessAnswer
from serve_app.api.fields import KeyOnlyRequest
from serve_app.api.operations import CANONICAL_PREFIX, PREFIXES, V6_PREFIX, Operation, routes
from serve_app.api.services import Services
from serve_app.keys import GENERATE

_OWN = (CANONICAL_PREFIX,)
_IMAGES = (*PREFIXES, V6_PREFIX)
_JOB = (SuccessAnswer, ProcessingAnswer, FailedAnswer)

OPERATIONS = (
    Operation("controlnet", controlnet, _JOB, ControlNetRequest, scope=GENERATE, metered=True, prefixes=_IMAGES),
    Operation("annotate", annotate, _JOB, AnnotateRequest, scope=GENERATE, metered=True, prefixes=_OWN),
    Operation("annotators", annotators_list, (AnnotatorsAnswer,), method="GET", scope=GENERATE, prefixes=_OWN),
    Operation("fetch", fetch, _JOB, FetchRequest, prefixes=_IMAGES),
    Operation("fetch/{request_id}", fetch, _JOB, KeyOnlyRequest, prefixes=_IMAGES),
    Operation("fetch/{request_id}", fetch, _JOB, method="GET", keyless=True, prefixes=_IMAGES),
    Operation("schedulers_list", schedulers_list, (SchedulersAnswer,), KeyOnlyRequest),
    Operation("get_all_models", get_all_models, (ModelsAnswer,), KeyOnlyRequest),
    Operation("verify_model", verify_model, (VerifyModelAnswer,), VerifyModelRequest),
    Operation("system_details", system_details, (SystemAnswer,), KeyOnlyRequest),
    Operation("jobs", jobs_list, (JobsAnswer,), method="GET", prefixes=_OWN),
    Operation("jobs/{request_id}", job_state, (JobAnswer,), method="GET", prefixes=_OWN),
    Operation("jobs/{request_id}", cancel_job, (CancelAnswer,), method="DELETE", prefixes=_OWN),
)
"""Every operation of the API. A new endpoint is one row here and one file in ``endpoints``."""


def build_application(services: Services) -> FastAPI:
    """The ASGI application of one gateway process. Starts nothing and opens nothing."""
    return FastAPI(
        title="ControlNet Serve",
        version=version("controlnet-serve"),
        description="Stable Diffusion with ControlNet behind the Stable Diffusion enterprise API.",
        routes=[*routes(OPERATIONS, services), *file_routes(services), *health_routes(services)],
        middleware=[
            Middleware(
                CORSMiddleware,
                allow_origins=services.config.server.cors_origins,
                allow_methods=("GET", "HEAD", "POST", "DELETE", "OPTIONS"),
                allow_headers=("*",),
                expose_headers=("Retry-After", "ETag", "Content-Range"),
            ),
            Middleware(LastResort),
        ],
        exception_handlers=HANDLERS,
    )
