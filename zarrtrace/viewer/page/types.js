/**
 * Types that the modules share; see schema/README.md for what they mean.
 *
 * @typedef {Object} ArrayInfo
 * @property {string} path folder below data/
 * @property {string[]} dims
 * @property {number[]} shape
 * @property {number[]} chunks
 * @property {"float32" | "uint32" | "uint8"} dtype
 * @property {string} [row] the store's name of the dimension `query`, if it is another
 * @property {number[]} [layers] decoder blocks along the layer dimension
 * @property {number} [scale] 8-bit attention: value of one step
 * @property {number} [missing] 8-bit attention: code of a missing value
 * @property {number} [bits]
 * @property {string[]} [places] of attention_to_spans: spans, then "@strongest"
 * @property {string} [hook] of residual_norm: the hook point, by TransformerLens's name
 * @property {string[]} [words]
 * @property {string[][]} [pairs]
 * @property {string[]} [statistics]
 *
 * @typedef {Object} Scenario
 * @property {string} name
 * @property {string[]} tags
 * @property {string[]} tokens
 * @property {number[]} special positions of special tokens, such as BOS
 * @property {number[]} token_ids
 * @property {Record<string, number[]>} spans
 * @property {Record<string, number>} options
 * @property {Record<string, string | number | boolean | null>} metadata
 * @property {Generated} [generated] absent if all tokens are the prompt
 * @property {number[]} layers
 * @property {number[]} missing
 * @property {Record<string, ArrayInfo>} arrays
 * @property {Record<string, string>} vocabulary
 * @property {Record<string, Record<string, string>>} sources
 *
 * @typedef {Object} Generated the text that the model wrote behind the prompt
 * @property {number} from its first token
 * @property {string} text
 * @property {string | null} choice the option that was found in it
 * @property {string} ended_by
 *
 * @typedef {Object} Index
 * @property {number} version
 * @property {string} title
 * @property {string | null} model
 * @property {Record<string, string>} vocabulary of the scenarios that were read
 * @property {string[]} scenarios names
 * @property {number} listed scenarios whose tags and metadata are in one file
 * @property {Record<string, Record<string, string>>} sources of the scenarios that were read
 * @property {Record<string, number[]>} [labels] layers whose features have labels, by array
 * @property {Strongest} [strongest] absent if the run has no index
 * @property {{call: string, arguments: string}} [source] how Python opens the run; absent from bundles
 * @property {Record<string, ArrayInfo>} run
 *
 * @typedef {Object} Strongest what the index of features holds
 * @property {string} [problem] why it cannot be used; then nothing else is there
 * @property {Record<string, number>} arrays numbers of features
 * @property {number[]} layers
 * @property {number} step how many features a file holds
 * @property {boolean} special whether special tokens are counted
 * @property {number} indexed
 * @property {number} scenarios
 *
 * @typedef {Object} View what is chosen; all of it is in the address
 * @property {string} scenario
 * @property {string} other scenario to compare with, or ""
 * @property {number} layer
 * @property {number} head -1 for the mean of heads
 * @property {number} token
 * @property {number} window first token of the window of a long prompt
 * @property {number} feature -1 for none
 * @property {string} sae array of features
 * @property {boolean} special whether special tokens count among the strongest
 * @property {string} zoom part of the large matrix, "query-query,key-key" by the first and last token, "" for all
 * @property {string} place span of the map of heads, "" for the one attended to most
 * @property {"panel" | "row" | "absolute"} scale what the strongest colour stands for
 * @property {string} theme "light", "dark" or "" for the system's
 *
 * @typedef {Object} Opening where a token's attention to a span is strongest
 * @property {number} layer
 * @property {number} head
 * @property {string} place
 * @property {number} value
 *
 * @typedef {Object} Block values of several matrices, for a window of queries and one of keys
 * @property {Float32Array} data (count, rows, columns)
 * @property {number} count
 * @property {number} rows
 * @property {number} columns
 * @property {number} firstRow token position of the first row
 * @property {number} firstColumn
 */
export {};
