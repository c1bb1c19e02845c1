import { readFile, realpath } from "node:fs/promises";
import { basename, isAbsolute } from "node:path";
import { checkText } from "../arguments.js";
import { KvferryError } from "../errors.js";
import type { WaitOptions } from "../waiting.js";
import { canonicalJson, fileSha256 } from "./identity.js";
import type { EngineContext, EngineModel } from "./node-llama-cpp.js";

/** What belongs to the cache's identity and cannot always be read from the engine. */
export interface IdentityOptions {
	/** SHA-256 of the model, 64 hexadecimal digits. Default: that of the model's file. */
	modelSha256?: string | undefined;
	/** The model's file. Default: what the engine says. */
	modelPath?: string | undefined;
	/**
	 * Names the LoRA adapters of the context with their scales: their hashes, say. Required when it has
	 * some.
	 */
	lora?: string | undefined;
}

/**
 * Refuses models whose state cannot be cut by tokens.
 *
 * @throws {@link KvferryError} `UNSUPPORTED_MODEL`, with the reason.
 */
export function checkModel({ fileInsights, filename }: EngineModel): void {
	const reasons: [boolean, string][] = [
		[fileInsights.isRecurrent, "is recurrent: its state is one for all tokens"],
		[fileInsights.isHybrid, "is a hybrid: part of its state is recurrent, one for all tokens"],
		[
			(fileInsights.swaSize ?? 0) > 0,
			"uses sliding-window attention: its state lacks the tokens that left the window",
		],
		[fileInsights.hasEncoder, "has an encoder: its state does not depend on leading tokens only"],
	];
	for (const [applies, reason] of reasons) {
		if (applies) {
			throw new KvferryError(
				"UNSUPPORTED_MODEL",
				`${filename ?? "The model"} ${reason}, so it cannot be cached.`,
			);
		}
	}
}

/**
 * All that attention state depends on besides the tokens and the state's shape (which says the KV
 * types and how values lie).
 *
 * @returns Canonical JSON.
 * @throws {@link KvferryError} `IDENTITY_UNKNOWN` names what is missing and the option to pass it in.
 */
export async function identityOf(
	context: EngineContext,
	options: IdentityOptions & Pick<WaitOptions, "signal">,
): Promise<string> {
	const { model } = context;
	const { llama } = model;
	const { repo, release } = llama.llamaCppRelease;
	return canonicalJson({
		engine: { repo, release, build: llama.buildType, gpu: llama.gpu },
		flashAttention: context.flashAttention,
		lora: loraOf(context, options.lora),
		// As the engine uses it, overrides included: RoPE's settings are in here.
		metadata: Reflect.get(model.fileInfo.metadata, model.architecture),
		model: await modelDigest(model, options),
	});
}

function loraOf(context: EngineContext, named: string | undefined): string {
	if (named !== undefined) {
		checkText("lora", named);
	}
	const adapters: unknown = Reflect.get(context, "_loraAdapters");
	const some = adapters instanceof Set ? adapters.size > 0 : undefined;
	if (named !== undefined && !(some && named === "")) {
		return named;
	}
	if (some === false) {
		return "";
	}
	throw new KvferryError(
		"IDENTITY_UNKNOWN",
		some
			? "The context has LoRA adapters: name them, with their scales, in the option `lora`."
			: "This release of node-llama-cpp does not tell whether the context has LoRA adapters: " +
					'pass the option `lora`, "" for none.',
	);
}

async function modelDigest(
	model: EngineModel,
	options: IdentityOptions & Pick<WaitOptions, "signal">,
): Promise<string> {
	if (options.modelSha256 !== undefined) {
		if (!/^[0-9a-f]{64}$/i.test(options.modelSha256)) {
			throw new KvferryError(
				"INVALID_ARGUMENT",
				`modelSha256 ${JSON.stringify(options.modelSha256)}: give 64 hexadecimal digits.`,
			);
		}
		return options.modelSha256.toLowerCase();
	}
	const path: unknown = options.modelPath ?? Reflect.get(model, "_modelPath");
	if (typeof path !== "string" || (options.modelPath === undefined && !isAbsolute(path))) {
		throw new KvferryError(
			"IDENTITY_UNKNOWN",
			"This release of node-llama-cpp does not tell the model's file: " +
				"pass the option `modelPath` or `modelSha256`.",
		);
	}
	if (model.filename !== undefined && basename(path) !== model.filename) {
		throw new KvferryError(
			"INVALID_ARGUMENT",
			`modelPath ${path}: the engine has loaded ${model.filename}.`,
		);
	}
	if (model.fileInfo.splicedParts > 1) {
		throw new KvferryError(
			"IDENTITY_UNKNOWN",
			`${model.filename} is one of ${model.fileInfo.splicedParts} files: ` +
				"pass one hash over all of them in the option `modelSha256`.",
		);
	}
	const known = digests.get(model);
	if (known?.path === path) {
		return known.sha256;
	}
	const sha256 = await fileSha256(path, options.signal);
	if (await isReplaced(path, model)) {
		throw new KvferryError(
			"IDENTITY_UNKNOWN",
			`${path} was replaced after the model was loaded, or was read by useDirectIo, which hides that: ` +
				"pass the loaded file's hash in the option `modelSha256`.",
		);
	}
	digests.set(model, { path, sha256 });
	return sha256;
}

/** What a model's file was when it was first asked for: the file may be replaced while the model is in use. */
const digests = new WeakMap<EngineModel, { path: string; sha256: string }>();

/** Whether the file is known to be another than the loaded one: Linux tells which files the engine has mapped. */
async function isReplaced(path: string, model: EngineModel): Promise<boolean> {
	let maps: string;
	let target: string;
	try {
		maps = await readFile("/proc/self/maps", "utf8");
		target = await realpath(path);
	} catch {
		return false; // not Linux, say
	}
	const mapped = new Set(maps.split("\n").map((line) => line.slice(line.indexOf("/"))));
	if (mapped.has(`${target} (deleted)`)) {
		return true;
	}
	// Without a GPU the engine reads the weights where they are mapped, for as long as the model is in use.
	const stays = Reflect.get(model, "useMmap") === true && model.llama.gpu === false;
	return stays && !mapped.has(target);
}
