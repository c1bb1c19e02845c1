/**
 * The part of onnxruntime and of transformers.js that kvferry uses. Their own classes fit, and kvferry needs
 * no copy of these packages to be built or type-checked.
 */

/** `Tensor`, of either. */
export interface EngineTensor {
	readonly type: string;
	readonly dims: readonly number[];
	readonly data: unknown;
	readonly location?: string;
}

/** The class of a tensor. */
// biome-ignore lint/suspicious/noExplicitAny: kvferry gives it type, data and dims; its overloads do not matter
export type EngineTensorClass<T extends EngineTensor> = new (...args: any[]) => T;

/** `InferenceSession`. */
export interface EngineSession {
	readonly inputNames: readonly string[];
	readonly outputNames: readonly string[];
	/** What the inputs are; not every onnxruntime tells. */
	readonly inputMetadata?: readonly EngineValue[];
}

/** `InferenceSession.ValueMetadata`. */
export interface EngineValue {
	readonly name: string;
	readonly isTensor: boolean;
	readonly type?: string;
	/** Numbers, and names of what is known later. */
	readonly shape?: readonly (number | string)[];
}

/** `PreTrainedModel` of transformers.js. */
export interface EngineModel {
	readonly sessions: Readonly<Record<string, EngineSession>>;
	// biome-ignore lint/suspicious/noExplicitAny: kvferry passes it on
	generate(options: any): Promise<any>;
}

/** `DynamicCache` of transformers.js: past_key_values by their names. */
// biome-ignore lint/suspicious/noExplicitAny: its own type is a record that is also a class
export type EngineDynamicCache = new (entries?: any) => any;
