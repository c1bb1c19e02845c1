// block_hash.json and chunk_hash.json: hashes of tokens, and the keys of objects.

import { isDeepStrictEqual } from "node:util";
import { UNREACHABLE } from "./outcome.mjs";

/** @typedef {import("./outcome.mjs").Json} Json */

/** @type {typeof import("../../ts/index.js")} */
let kvferry;

/** @type {import("./outcome.mjs").Schema} */
export default function hash(data, built) {
	kvferry = built;
	const first = data?.cases?.[0] ?? {};
	if ("block_hashes" in first) {
		return [
			["cases", data.cases, blockCase],
			["none_hash", data.none_hash ?? [], noneHash],
			["serialization_examples", data.serialization_examples ?? [], serializedBlock],
			["group_id_packing", data.group_id_packing ?? [], groupId],
			["int_event_hash", data.int_event_hash ?? [], intEventHash],
			["block_hash_list_with_block_size", data.block_hash_list_with_block_size ?? [], coarseList],
		];
	}
	if ("hash_algorithm" in first) {
		return [
			["cases", data.cases, chunkCase],
			["serialization_examples", data.serialization_examples ?? [], serializedChunk],
			["object_keys", data.object_keys ?? [], objectKeys],
		];
	}
	return undefined;
}

/** Every form in which the package takes these tokens. */
function forms(/** @type {(number | string)[]} */ ids) {
	/** @type {import("../../ts/index.js").Tokens[]} */
	const forms = [ids.map(BigInt)];
	if (ids.every((id) => typeof id === "number")) {
		forms.push(ids);
		if (ids.every((id) => id >= 0 && id <= 0xffff_ffff)) {
			forms.push(Uint32Array.from(ids));
		}
	}
	return forms;
}

function bytes(/** @type {string} */ hex) {
	return new Uint8Array(Buffer.from(hex, "hex"));
}

/** Whether the call throws a KvferryError of one of these codes. */
function refuses(/** @type {() => unknown} */ call, /** @type {string[]} */ ...codes) {
	try {
		call();
		return false;
	} catch (error) {
		return error instanceof kvferry.KvferryError && codes.includes(error.code);
	}
}

function blockCase(/** @type {Json} */ item) {
	const given = forms(item.token_ids_str ?? item.token_ids);
	const appended = forms(item.append_tokens_str ?? item.append_tokens ?? []);
	return Object.entries(item.block_hashes).every(([algorithm, expected]) =>
		given.every((tokens) =>
			appended.every((more) => {
				const hasher = new kvferry.BlockHasher({
					blockSize: item.block_size,
					algorithm: /** @type {import("../../ts/index.js").BlockAlgorithm} */ (algorithm),
					seed: item.PYTHONHASHSEED ?? undefined,
					cacheSalt: item.cache_salt ?? undefined,
					lora: item.lora ?? undefined,
					mmFeatures: item.mm_features ?? undefined,
					promptEmbeds: embeds(item.prompt_embeds),
					numHashLookaheadTokens: item.lookahead ?? undefined,
				});
				const before = hasher.append(tokens).toHex();
				const all = [...before, ...hasher.append(more).toHex()];
				const split = item.num_blocks_before_append ?? before.length;
				return before.length === split && isDeepStrictEqual(all, expected);
			}),
		),
	);
}

/** A tensor as the package takes it. */
function embeds(/** @type {Json} */ tensor) {
	if (!tensor) {
		return undefined;
	}
	const data = bytes(tensor.raw_hex);
	const [rows] = tensor.shape;
	return { data, bytesPerToken: rows > 0 ? data.length / rows : 1 };
}

function noneHash(/** @type {Json} */ item) {
	const options = { blockSize: 1, algorithm: item.algo, seed: item.PYTHONHASHSEED ?? undefined };
	if (item.random_seed) {
		return refuses(() => kvferry.blockHashes([7], options), "INVALID_ARGUMENT");
	}
	const parent = bytes(item.none_hash);
	return isDeepStrictEqual(
		kvferry.blockHashes([7], options),
		kvferry.blockHashes([7], { ...options, parent }),
	);
}

function serializedBlock(/** @type {Json} */ item) {
	const keys = item.extra_keys ?? [];
	// Behind a lookahead's keys stand its tokens.
	const hasLookahead = keys.length > 1 && !Array.isArray(keys.at(-1));
	/** @type {Json[]} */
	const own = hasLookahead ? (keys[0] ?? []) : keys;
	/** @type {number[]} */
	const after = hasLookahead ? keys.slice(1) : [];
	const tags = own.map(([tag]) => tag);
	const blockSize = item.token_ids.length;
	const first = item.parent_is_none_hash;
	const salt = own.find(([tag]) => tag === "cache_salt");
	if (blockSize === 0 || tags.includes("prompt_embeds") || (salt && !first)) {
		return UNREACHABLE; // a block of no tokens, a digest without its rows, a salt after a known hash
	}
	const [, name, path] = own.find(([tag]) => tag === "lora") ?? [];
	const options = {
		blockSize,
		algorithm: item.algo,
		seed: item.PYTHONHASHSEED ?? undefined,
		parent: first ? undefined : bytes(item.parent_hex),
		cacheSalt: salt?.[1],
		lora: name === undefined ? undefined : { name, path },
		mmFeatures: own
			.filter(([tag]) => tag === "mm")
			// Into the block and not beyond, since that would be its last item.
			.map(([, identifier, offset]) => ({ identifier, offset, length: Math.max(1, 1 - offset) })),
		numHashLookaheadTokens: after.length,
	};
	return forms([...item.token_ids, ...after]).every((tokens) =>
		isDeepStrictEqual(kvferry.blockHashes(tokens, options).toHex(), [item.hash]),
	);
}

function groupId(/** @type {Json} */ item) {
	const packed = kvferry.packGroupId(bytes(item.block_hash), item.group_id);
	const { hash, group } = kvferry.unpackGroupId(packed);
	return (
		isDeepStrictEqual(packed, bytes(item.packed)) &&
		isDeepStrictEqual(new Uint8Array(hash), bytes(item.unpacked_hash)) &&
		group === item.unpacked_group
	);
}

function intEventHash(/** @type {Json} */ item) {
	return String(kvferry.eventHash(bytes(item.block_hash))) === item.as_int_str;
}

function coarseList(/** @type {Json} */ item) {
	const hashes = new kvferry.Hashes(
		Uint8Array.from({ length: item.num_hashes }, (_, at) => at),
		1,
	);
	const coarse = hashes.coarsen(item.target_block_size / item.hash_block_size);
	return isDeepStrictEqual([...coarse.bytes], item.indices_used);
}

/** LMCache hashes from token 0 to `end` and leaves out what begins before `start`. */
function chunkCase(/** @type {Json} */ item) {
	const { chunk_size: chunkSize, hash_algorithm: algorithm, start, end } = item;
	const parent = item.prefix_hash_hex ? bytes(item.prefix_hash_hex) : undefined;
	const ids = (item.token_ids_str ?? item.token_ids).slice(0, end ?? undefined);
	return forms(ids).every((tokens) => {
		const hash = () => kvferry.chunkHashes(tokens, { chunkSize, algorithm, parent });
		if (item.error) {
			return refuses(hash, "INVALID_TOKEN");
		}
		const hashes = hash()
			.toHex()
			.slice(Math.ceil(start / chunkSize));
		return isDeepStrictEqual(hashes, item.chunk_hashes_hex);
	});
}

function serializedChunk(/** @type {Json} */ item) {
	const { hash_algorithm: algorithm, token_ids, hash_hex } = item;
	const options = { chunkSize: token_ids.length, algorithm, parent: bytes(item.prefix_hash_hex) };
	return forms(token_ids).every((tokens) =>
		isDeepStrictEqual(kvferry.chunkHashes(tokens, options).toHex(), [hash_hex]),
	);
}

function objectKeys(/** @type {Json} */ item) {
	const { model_name: modelName, world_size: worldSize, cache_salt: cacheSalt } = item;
	const key = (
		/** @type {number} */ group,
		/** @type {string} */ hash,
		/** @type {number} */ rank,
	) => kvferry.objectKey({ modelName, worldSize, rank, group, chunkHash: bytes(hash), cacheSalt });
	/** @type {string[]} */
	const hashes = item.chunk_hashes_hex;
	/** @type {number[]} */
	const groups = item.object_group_ids;
	// Without a worker: every rank's key of a chunk, then of the next chunk.
	const ranks = item.worker_id === null ? [...Array(worldSize).keys()] : [item.worker_id];
	const keys = () =>
		groups.map((group) => hashes.flatMap((hash) => ranks.map((rank) => key(group, hash, rank))));
	if (item.error || item.ipc_key_error) {
		return refuses(keys, "INVALID_ARGUMENT", "INVALID_SALT");
	}
	const strings = item.keys.map((/** @type {Json[]} */ group) => group.map(({ string }) => string));
	return isDeepStrictEqual(keys(), strings);
}
