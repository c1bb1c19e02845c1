/**
 * Lets `instanceof` know the objects of every copy of a class: an application may load the ESM and the CommonJS build.
 *
 * @param name Of the class, for all copies.
 */
export function brand(type: { readonly prototype: object }, name: string): void {
	const mark = Symbol.for(`kvferry.${name}`);
	Object.defineProperty(type.prototype, mark, { value: true });
	Object.defineProperty(type, Symbol.hasInstance, {
		value: (value: unknown) => typeof value === "object" && value !== null && mark in value,
	});
}
