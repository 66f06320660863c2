"""The course's terms: a sentence each, the Chinese term, the section of the report. Written to docs/glossary.md."""

from typing import NamedTuple


class Term(NamedTuple):
    """`sentence` ends with a full stop and needs no other entry to be understood."""

    english: str
    chinese: str
    section: str
    sentence: str


GLOSSARY = (
    Term("absorption", "矩阵吸收", "2.1.1",
         "Moving the up-projections of keys and values to the query's side, so that attention reads the latent."),
    Term("acceptance rate", "接受率", "5.4.3",
         "The share of drafted tokens that the main model would have written itself."),
    Term("active parameters", "激活参数", "2.1.2",
         "The parameters that one token is multiplied with: all of attention, few of the experts."),
    Term("affinity", "亲和度", "2.1.2", "The sigmoid of a token's product with an expert's row of the router."),
    Term("auxiliary-loss-free balancing", "无辅助损失负载均衡", "2.1.2",
         "Balancing experts by a bias that changes which are chosen, and by no term of the loss."),
    Term("batch-wise loss", "批级均衡损失", "4.5.3",
         "The balance loss with the whole batch as one sequence, so that single texts may stay uneven."),
    Term("causal chain", "因果链", "2.2",
         "That each prediction depth sees one token more than the depth before, and never one that comes later."),
    Term("decoupled key", "解耦键", "2.1.1",
         "A second, rotated part of the key, shared by all heads, that carries position beside the latent."),
    Term("draft", "草稿 token", "5.4.3",
         "A token that a cheap module guessed; it enters the text only if the main model would have written it."),
    Term("expert load", "专家负载", "2.1.2", "How many tokens of a batch chose an expert."),
    Term("expert specialisation", "专家专业化", "4.5.3",
         "That an expert's load depends on what is read: on the token, and on the kind of text."),
    Term("fill-in-the-middle", "中间填充", "4.1",
         "Training on a document whose middle was moved to its end, so that the model learns to fill a hole."),
    Term("fine-grained experts", "细粒度专家", "2.1.2",
         "Many small experts instead of few large ones: the same work, far more sets to choose."),
    Term("group, node", "组、节点", "2.1.2", "Experts that live on one machine; a token may go to few of them."),
    Term("grouped-query attention", "分组查询注意力", "2.1.1",
         "Attention in which each group of heads shares one key and one value a token."),
    Term("key-value cache", "键值缓存", "2.1.1", "What decoding keeps of earlier tokens, so as not to compute it again."),
    Term("latent", "潜在向量", "2.1.1",
         "The short vector from which a token's keys and values are expanded, and all that is kept of them."),
    Term("low-rank joint compression", "低秩联合压缩", "2.1.1",
         "One down-projection for keys and values of all heads together."),
    Term("MaxVio", "最大违反度", "", "The largest load above the mean load, over the mean load; 0 is perfect balance."),
    Term("multi-head latent attention", "多头潜在注意力", "2.1.1",
         "Attention whose keys and values are expanded from a latent a token."),
    Term("multi-query attention", "多查询注意力", "2.1.1",
         "Attention in which all heads share one key and one value a token."),
    Term("multi-token prediction", "多 token 预测", "2.2",
         "Predicting also the token after the next one, with a small module behind the main model."),
    Term("node-limited routing", "节点受限路由", "2.1.2", "A token's experts come from at most M groups."),
    Term("packing", "打包", "4.1", "Joining documents end to end, so that every sequence is full."),
    Term("routed expert", "路由专家", "2.1.2", "A small feed-forward network that works for the tokens that chose it."),
    Term("routing bias", "路由偏置", "2.1.2",
         "A number an expert that is added to its affinity for the choice, and to no weight."),
    Term("sequence-wise loss", "序列级均衡损失", "2.1.2",
         "A very small term of the loss that keeps the load even within single sequences."),
    Term("shared expert", "共享专家", "2.1.2",
         "A feed-forward network that works for every token, beside the chosen ones."),
    Term("softmax scale", "softmax 缩放系数", "4.3",
         "The factor of the attention logit: one over the root of a head's width, under YaRN times a square."),
    Term("speculative decoding", "推测解码", "5.4.3",
         "Drafting a token cheaply and having the main model confirm it while it computes the next one."),
    Term("unigram entropy", "一元熵", "",
         "The loss of a model that knows only how frequent each token is: below it begins the use of context."),
)
