# %% [markdown]
# # Fine-tune an encoder, export it, and use it without torch
#
# The messages of a help desk shall find their topic. This notebook
#
# 1. fine-tunes an encoder on a few labelled messages, with sentence-transformers;
# 2. exports it to a bundle, which is compared with PyTorch before it gets its name;
# 3. loads the bundle, and finds the topics of new messages with ONNX Runtime alone.
#
# It needs `pip install '.[export]' sentence-transformers accelerate datasets`, no network and no GPU. The encoder is
# the small one of the package; put the id of another in its place, such as `Alibaba-NLP/gte-base-en-v1.5`, and your own
# messages in place of these.

# %% [markdown]
# ## Messages and topics
#
# Five topics, each with eight messages to learn from and three to judge by.

# %%
LEARN = {
    "delivery": """my parcel has not arrived yet | where is my order | the package is late | the courier never came
        the shipment is lost | when will my box be delivered | it was sent to the wrong address
        the tracking page shows nothing""",
    "payment": """my card was charged twice | the invoice shows a wrong amount | i want to pay by bank transfer
        the payment was refused | please send me a receipt | the price on the bill is too high | my credit card expired
        you took money from my account""",
    "return": """i want to send the shoes back | the shirt does not fit | please take the lamp back
        how do i return a gift | the colour is wrong and i want another one | can i exchange it for a larger size
        i changed my mind about the chair | where do i find the label for the return""",
    "account": """i forgot my password | i cannot log in | please delete my account | how do i change my email address
        my user name is not accepted | the code for the login never comes | my profile shows an old name
        somebody else uses my account""",
    "defect": """the screen is broken | the machine makes a loud noise | it stopped working after a week
        the battery does not charge | there is a crack in the glass | the lamp does not turn on
        water runs out of the kettle | one wheel of the cart is damaged""",
}
JUDGE = {
    "delivery": "the driver has not brought my parcel | my order is lost on the way | the box is late again",
    "payment": "the bill has a wrong price | you charged my credit card two times | i need a receipt for the payment",
    "return": "how can i send the chair back | the shoes do not fit me | i want to exchange the shirt",
    "account": "my password is not accepted | how do i delete my user profile | i cannot change my login name",
    "defect": "the kettle stopped working | the glass of the screen has a crack | the machine does not turn on",
}


def labelled(topics):
    """Return the messages and the number of the topic of each."""
    pairs = [
        (message.strip(), number)
        for number, text in enumerate(topics.values())
        for line in text.splitlines()
        for message in line.split("|")
    ]
    return [message for message, _ in pairs], [number for _, number in pairs]


learn, learn_topics = labelled(LEARN)
judge, judge_topics = labelled(JUDGE)
print(len(learn), "messages to learn from,", len(judge), "to judge by")

# %% [markdown]
# ## Before
#
# A message belongs to the topic whose messages have the nearest mean. The small encoder fills masks, and nobody trained
# it for similarity.

# %%
import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from gte_deploy.models import builtin_path


def accuracy(encode):
    """Return the share of the judged messages that are nearest to the mean of their topic."""
    embeddings, topics = encode(learn), np.array(learn_topics)
    means = np.stack([embeddings[topics == number].mean(0) for number in range(len(LEARN))])  # [topics, D]
    nearest = (encode(judge) @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T).argmax(1)
    return float((nearest == np.array(judge_topics)).mean())


# The weights are stored in 16 bits; training needs 32.
model = SentenceTransformer(str(builtin_path()), device="cpu", model_kwargs={"dtype": torch.float32})


def with_torch(texts):
    """Return embeddings of length 1: [texts, D] float32."""
    return model.encode(texts, normalize_embeddings=True, show_progress_bar=False)


before = accuracy(with_torch)
print(f"right before: {before:.0%}")

# %% [markdown]
# ## Fine-tuning
#
# The loss draws messages of one topic together, and pushes those of other topics away.

# %%
import tempfile
from pathlib import Path

from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import BatchAllTripletLoss
from transformers import PrinterCallback

folder = Path(tempfile.mkdtemp())
torch.manual_seed(0)
trainer = SentenceTransformerTrainer(
    model=model,
    args=SentenceTransformerTrainingArguments(
        output_dir=str(folder / "run"),
        num_train_epochs=12,
        per_device_train_batch_size=len(learn),
        learning_rate=1e-4,
        warmup_steps=0,
        lr_scheduler_type="constant",
        use_cpu=True,
        seed=0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_dict({"sentence": learn, "label": learn_topics}),
    loss=BatchAllTripletLoss(model),
)
trainer.remove_callback(PrinterCallback)
trainer.train()
model.eval()
model.save_pretrained(str(folder / "my-encoder"))
after = accuracy(with_torch)
print(f"right after: {after:.0%}")

# %% [markdown]
# ## Export
#
# The same as `gte-export my-encoder my-bundle --max-len 64` on the command line. Pooling and length are those of the
# checkpoint's files. An export that differs from PyTorch fails.

# %%
from gte_deploy.exporters.export import export

result = export(folder / "my-encoder", folder / "my-bundle", max_length=64)
print("task:", result.manifest.spec.task)
print("compared with PyTorch:", "passed" if result.parity.passed else "failed")

# %% [markdown]
# ## Without torch
#
# From here on, `pip install '.[cpu]'` is enough. The embeddings are those of sentence-transformers.

# %%
import gte_deploy

with gte_deploy.load(folder / "my-bundle", backend="onnx") as bundle:

    def with_bundle(texts):
        """Return embeddings of length 1: [texts, D] float32."""
        return bundle.encode(texts, normalize_embeddings=True)

    served = accuracy(with_bundle)
    difference = float(np.abs(with_bundle(judge) - with_torch(judge)).max())

print(f"right with the bundle: {served:.0%}")
print("largest difference of an embedding below 1e-5:", difference < 1e-5)
