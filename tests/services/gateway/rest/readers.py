"""What reads requests, without a server around it."""

from services.common.settings import Settings
from services.gateway.access.request_limits import RequestLimits
from services.gateway.rest.requests import RequestReader
from services.gateway.served_model import ServedModel


def reader_of(settings: Settings) -> RequestReader:
    model = ServedModel.load(settings)
    compiler = model.new_grammar_compiler()
    return RequestReader(settings, RequestLimits(settings, model), model.tokenizer, compiler)
