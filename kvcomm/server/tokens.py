"""`POST /tokenize` and `POST /detokenize`: what the tokens of a text, a conversation or an answer are.

`GET /tokenizer_info` says what else a client needs that leaves tokenizing to the server, as lm-evaluation-harness does.
"""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Depends

from kvcomm.server.access import security
from kvcomm.server.bodies import BodyRoute
from kvcomm.server.errors import documented
from kvcomm.server.generation import CallDep, GenerationCall
from kvcomm.server.schemas.chat import ChatRequest
from kvcomm.server.schemas.tokens import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest, TokenizerInfo
from kvcomm.server.state import StateDep

router = APIRouter(tags=["kvcomm"], dependencies=[Depends(security)], route_class=BodyRoute)
ERRORS = documented(400, 401, 403, 404, 408, 413, 422, 429, 500, 503, 504)


@router.post("/tokenize", operation_id="tokenize", responses=ERRORS)
async def tokenize(body: TokenizeRequest, call: CallDep) -> Tokenized:
    """The token ids that a request with this prompt or these messages would have. Nothing is computed."""
    _require_model(body.model, call)
    return await call.guard(call.make(partial(_tokenized, body, call)))


@router.post("/detokenize", operation_id="detokenize", responses=ERRORS)
async def detokenize(body: DetokenizeRequest, call: CallDep) -> Detokenized:
    """The text of token ids, special tokens included."""
    _require_model(body.model, call)
    return await call.guard(call.make(partial(_text_of, body, call)))


@router.get("/tokenizer_info", operation_id="tokenizerInfo", responses=documented(401, 403, 429, 500))
async def tokenizer_info(state: StateDep) -> TokenizerInfo:
    """The tokenizer of the model that is served."""
    tokenizer = state.engine.tokenizer
    template = tokenizer.chat_template
    return TokenizerInfo(
        tokenizer_class=type(tokenizer).__name__,
        model_max_length=state.engine.max_context,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        unk_token=tokenizer.unk_token,
        chat_template=template if isinstance(template, str) else None,  # some have several, by name
    )


def _require_model(model: str | None, call: GenerationCall) -> None:
    if model is not None:
        call.state.adapter_of(model)


def _tokenized(body: TokenizeRequest, call: GenerationCall) -> Tokenized:
    state = call.state
    if body.prompt is not None:
        ids = state.prompts.tokens(body.prompt, adds_start=body.add_special_tokens is not False)
    else:
        ids = state.prompts.chat(_chat(body, state.settings.name), call.tenant.name).token_ids
    engine = state.engine
    pieces = (str(engine.tokenizer.convert_ids_to_tokens(token_id)) for token_id in ids)
    return Tokenized(
        count=len(ids),
        max_model_len=engine.max_context,
        tokens=ids,
        token_strs=list(pieces) if body.return_token_strs else None,
    )


def _chat(body: TokenizeRequest, model: str) -> ChatRequest:
    return ChatRequest(
        model=model,
        messages=body.messages or [],
        tools=body.tools,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template_kwargs=body.chat_template_kwargs,
    )


def _text_of(body: DetokenizeRequest, call: GenerationCall) -> Detokenized:
    engine = call.state.engine
    if body.tokens:
        engine.read_prompt(body.tokens, is_start=False)  # which knows what ids there are
    return Detokenized(prompt=engine.texts.decode(body.tokens))
