"""One submission as a trace, printed: needs `pip install opentelemetry-sdk`. See docs/guides/tracing.md.

python examples/tracing.py localhost:3999 file:///tmp/tracing-store
"""

import sys
import threading

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

from opsqueue.consumer import ConsumerClient
from opsqueue.producer import ProducerClient


def one_line(span: ReadableSpan) -> str:
    """Instead of the exporter's JSON."""
    context = span.get_span_context()
    trace_id = context.trace_id if context is not None else 0
    return f"{trace_id:032x} {span.name}\n"


def main() -> None:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(formatter=one_line)))
    trace.set_tracer_provider(provider)
    consumer = ConsumerClient(*sys.argv[1:])
    thread = threading.Thread(target=lambda: consumer.run_each_op(abs))
    thread.start()
    with trace.get_tracer("example").start_as_current_span("nightly job"):
        print(list(ProducerClient(*sys.argv[1:]).run_submission([-1, -2, -3], chunk_size=1)))
    consumer.stop()
    thread.join()


if __name__ == "__main__":
    main()
