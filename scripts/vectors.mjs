// `npm run vectors -- DIR`: runs the oracle vectors of DIR through the built package and prints a
// line for each file, then the cases that need a later version, then the sum.

import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { isDeepStrictEqual } from "node:util";
import { buildAddon, buildJavaScript } from "./build.mjs";
import { setup } from "./setup.mjs";

/** What a file's cases come to. @typedef {{ passed: number, failed: number, pending: number, unreachable: number }} Sum */
/** Any JSON value. @typedef {any} Json */

const PENDING = Symbol("needs extra keys that this version has not");
const UNREACHABLE = Symbol("no request can have it, so the package does not compute it");

const dir = process.argv[2];
if (dir === undefined) {
	console.error("usage: npm run vectors -- DIR");
	process.exit(2);
}
setup();
buildAddon();
buildJavaScript();
/** @type {typeof import("../ts/index.js")} */
const kvferry = await import(new URL("../dist/index.js", import.meta.url).href);

/** @type {Sum} */
const total = { passed: 0, failed: 0, pending: 0, unreachable: 0 };
for (const file of readdirSync(dir).sort()) {
	const sections = file.endsWith(".json")
		? sectionsOf(parse(readFileSync(join(dir, file), "utf8")))
		: undefined;
	if (sections === undefined) {
		console.log(`${file}: not run, no schema that this version knows`);
		continue;
	}
	const sum = run(file, sections);
	const pending = sum.pending > 0 ? `, ${sum.pending} pending` : "";
	const rest = sum.unreachable > 0 ? `, ${sum.unreachable} that no request can have` : "";
	console.log(`${file}: ${sum.passed} passed, ${sum.failed} failed${pending}${rest}`);
	total.passed += sum.passed;
	total.failed += sum.failed;
	total.pending += sum.pending;
}
console.log(`${total.pending} pending (need mm, prompt_embeds or lookahead: not in this version)`);
console.log(`${total.passed} passed, ${total.failed} failed`);
process.exitCode = total.failed > 0 ? 1 : 0;

/** JSON whose integers beyond 2^53 become strings, where JSON.parse would round them. */
function parse(/** @type {string} */ text) {
	const quoted = text.replace(/"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/g, (token) =>
		/^-?\d+$/.test(token) && !Number.isSafeInteger(Number(token)) ? `"${token}"` : token,
	);
	return JSON.parse(quoted);
}

/**
 * The sections of a file, each with the check of one of its cases: `true`, `false` or PENDING.
 *
 * @returns {[string, Json[], (item: Json) => boolean | typeof PENDING | typeof UNREACHABLE][] | undefined}
 */
function sectionsOf(/** @type {Json} */ data) {
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

function run(
	/** @type {string} */ file,
	/** @type {NonNullable<ReturnType<typeof sectionsOf>>} */ sections,
) {
	/** @type {Sum} */
	const sum = { passed: 0, failed: 0, pending: 0, unreachable: 0 };
	for (const [section, items, check] of sections) {
		for (const [index, item] of items.entries()) {
			let outcome;
			let reason = "another result";
			try {
				outcome = check(item);
			} catch (error) {
				outcome = false;
				reason = String(error);
			}
			if (outcome === PENDING) {
				sum.pending++;
			} else if (outcome === UNREACHABLE) {
				sum.unreachable++;
			} else if (outcome) {
				sum.passed++;
			} else {
				sum.failed++;
				console.log(`${file}: ${section} ${item.id ?? index}: ${reason}`);
			}
		}
	}
	return sum;
}

/** Every form in which the package takes these tokens. */
function forms(/** @type {(number | string)[]} */ ids) {
	/** @type {import("../ts/index.js").Tokens[]} */
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
	if (item.mm_features?.length > 0 || item.prompt_embeds || item.lookahead > 0) {
		return PENDING;
	}
	const given = forms(item.token_ids_str ?? item.token_ids);
	const appended = forms(item.append_tokens_str ?? item.append_tokens ?? []);
	return Object.entries(item.block_hashes).every(([algorithm, expected]) =>
		given.every((tokens) =>
			appended.every((more) => {
				const hasher = new kvferry.BlockHasher({
					blockSize: item.block_size,
					algorithm: /** @type {import("../ts/index.js").BlockAlgorithm} */ (algorithm),
					seed: item.PYTHONHASHSEED ?? undefined,
					cacheSalt: item.cache_salt ?? undefined,
					lora: item.lora ?? undefined,
				});
				const before = hasher.append(tokens).toHex();
				const all = [...before, ...hasher.append(more).toHex()];
				const split = item.num_blocks_before_append ?? before.length;
				return before.length === split && isDeepStrictEqual(all, expected);
			}),
		),
	);
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
	const blockSize = item.token_ids.length;
	const keys = (item.extra_keys ?? []).map((/** @type {Json} */ key) => key?.[0]);
	if (keys.includes("mm") || keys.includes("prompt_embeds")) {
		return PENDING;
	}
	if (keys.length > 0 || blockSize === 0) {
		return UNREACHABLE; // a salt after a known hash, keys of no kind, a block of no tokens
	}
	const { algo: algorithm, PYTHONHASHSEED: seed } = item;
	const options = { blockSize, algorithm, seed: seed ?? undefined, parent: bytes(item.parent_hex) };
	return forms(item.token_ids).every((tokens) =>
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
