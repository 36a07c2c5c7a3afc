"""Ask a server with the clients of LangChain, LlamaIndex and Cohere: URL, texts (JSON), query -> answers on stdout."""

import json
import sys

from cohere import ClientV2
from langchain_openai import OpenAIEmbeddings
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

url, texts, query = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
openai = {"api_key": "none", "model": "embed"}
embedders = {
    "langchain-openai": OpenAIEmbeddings(base_url=f"{url}/v1", check_embedding_ctx_length=False, **openai),
    "llama-index-openai-like": OpenAILikeEmbedding(model_name="embed", api_base=f"{url}/v1", api_key="none"),
    "llama-index-tei": TextEmbeddingsInference(model_name="embed", base_url=url, timeout=60),
}
vectors = {}
for name, client in embedders.items():
    many = client.embed_documents if name.startswith("langchain") else client.get_text_embedding_batch
    vectors[name] = many(texts)

nodes = [NodeWithScore(node=TextNode(text=text), score=0.0) for text in texts]
ranked = TextEmbeddingInference(base_url=url, model_name="rank", top_n=2).postprocess_nodes(nodes, query_str=query)
cohere = ClientV2(api_key="none", base_url=url).rerank(model="rank", query=query, documents=texts, top_n=2)
rankings = {
    "llama-index-tei": [(texts.index(node.node.get_content()), node.score) for node in ranked],
    "cohere": [(entry.index, entry.relevance_score) for entry in cohere.results],
}
print(json.dumps({"vectors": vectors, "rankings": rankings}))
