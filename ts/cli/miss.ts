import type { PromptQuestion } from "../client.js";
import type { Explanation, MissingChunk, Removal } from "../native-binding.js";
import type { Status } from "../server.js";

/** Says in words why a prompt is no hit: first how much of it is, then each reason for the rest. */
export function explainMiss(
	explanation: Explanation,
	missing: MissingChunk,
	question: PromptQuestion,
	chunkSize: number,
	status: Status,
): string[] {
	const { chunks, hitChunks } = explanation;
	const { kvWorldSize } = question;
	const model = called(question.modelName);
	const first = hitChunks * chunkSize;
	const what =
		`${hitChunks} of ${chunks} whole chunks hit. The first that does not is chunk ${hitChunks} ` +
		`(tokens ${first} to ${first + chunkSize - 1}).`;
	const reasons: string[] = [];
	if (missing.writingRanks.length > 0) {
		reasons.push(
			`It is being written right now, by KV rank ${list(missing.writingRanks)}: it hits once all ` +
				"ranks have committed it.",
		);
	}
	if (missing.missingRanks.length > 0) {
		reasons.push(
			`KV rank ${list(missing.missingRanks)} of ${kvWorldSize} does not have it, others do: a hit ` +
				"needs all of them. Look at the logs of those workers.",
		);
	}
	if (missing.otherSalts > 0) {
		reasons.push(
			`It is stored under another salt (${missing.otherSalts} of them): ask with the --salt that it ` +
				"was stored with, if that is yours.",
		);
	}
	if (missing.otherModels.length > 0) {
		reasons.push(
			`It is stored for another model (${list(missing.otherModels.map(called))}), not for ${model}: the ` +
				"engine that looks it up registers another name.",
		);
	}
	if (missing.otherWorldSizes.length > 0) {
		reasons.push(
			`It is stored for a KV world size of ${list(missing.otherWorldSizes)}, not of ` +
				`${kvWorldSize}: what is divided in another way cannot be shared.`,
		);
	}
	if (missing.otherLayouts.length > 0) {
		const layouts = missing.otherLayouts.map(({ shape, dtype }) => `${shape.join(" × ")} ${dtype}`);
		reasons.push(
			`It is stored in another layout (${list(layouts)}) than the engine registered last for ` +
				`${model}: another element type, number of layers or width is another cache.`,
		);
	}
	if (missing.removed !== undefined) {
		reasons.push(howItWent(missing.removed));
	}
	if (reasons.length === 0) {
		const refused = Number(status.refused_chunks ?? 0);
		const early = Number(status.refused_growing_chunks ?? 0);
		const growing = `; ${early} chunks came faster than its memory grows`;
		const room = `; ${refused} chunks were refused for want of room since it started (a tenant's cap, say: kvferry quota)`;
		reasons.push(
			"It was never stored, as far as the server knows: its log of events reaches back to " +
				`${time(missing.logSinceMs)}${refused > 0 ? room : ""}${early > 0 ? growing : ""}.`,
		);
	}
	return [what, ...reasons];
}

function howItWent({ cause, atMs, by }: Removal): string {
	switch (cause) {
		case "evicted":
			return `It was evicted at ${time(atMs)}, to make room for ${forWhom(by)}: a server with more --memory keeps more.`;
		case "cleared":
			return `It went at ${time(atMs)}, when the cache was cleared.`;
		case "damaged":
			return `It was dropped at ${time(atMs)}: a reader found other bytes than were stored. It is stored anew once it is computed.`;
	}
}

function forWhom(by: Removal["by"]): string {
	if (by === undefined) {
		return "others";
	}
	return by.own
		? "what the same tenant stored"
		: `what the tenant ${by.tenant} stored (as /metrics and kvferry quota --json call it)`;
}

/** A model as messages name it: the one of a PrefixCache is made of its identity, which only who asks knows. */
export function called(modelName: string): string {
	const [, digest] = /^kvferry\/([0-9a-f]{12})[0-9a-f]{52}$/.exec(modelName) ?? [];
	return digest === undefined ? modelName : `the identity whose SHA-256 begins with ${digest}`;
}

function time(ms: number): string {
	return new Date(ms).toISOString();
}

function list(items: readonly (number | string)[]): string {
	return items.join(", ");
}
