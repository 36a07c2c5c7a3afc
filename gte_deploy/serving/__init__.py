"""The HTTP server, `gte-deploy serve`: bundles behind the routes of text-embeddings-inference, OpenAI and Cohere.

options.py      the options of the server, which load no library
failures.py     from an error to the status and the body of an answer
json_body.py    strict JSON
requests.py     the form of each request, and the checks of its fields
answers.py      the form of each answer
handlers.py     from a request to an answer, by the methods of a Model
routes.py       the table of routes
document.py     /openapi.json from that table
registry.py     the models by name, and the state of the server
running.py      the requests in work: limits, deadlines, callers that went away
metrics.py      Prometheus
tracing.py      OpenTelemetry
observing.py    what surrounds each request: its id, span, metrics and line in the log; the bearer token
page/           the page at /, which asks the routes as any client does
app.py          the ASGI application of all these
server.py       the process: sockets, signals, logs
"""
