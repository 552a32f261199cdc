// The page over a gateway in memory: http://127.0.0.1:5173/dev/?layers=64&experts=256&k=8&collapsed
import { mount } from "../src/mount";
import { FakeGateway } from "./fake-gateway";

const parameters = new URLSearchParams(window.location.search);
const fake = new FakeGateway({
  numLayers: Number(parameters.get("layers") ?? 4),
  numExperts: Number(parameters.get("experts") ?? 8),
  topK: Number(parameters.get("k") ?? 2),
  isCollapsed: parameters.has("collapsed"),
  hasSession: !parameters.has("empty"),
  numSteps: Number(parameters.get("steps") ?? 0),
});
let position = 0;
for (; position < 400; position++) fake.route((position * 31) % 251, position);
setInterval(() => {
  fake.route((position * 31) % 251, position++);
  fake.wake();
}, 100);
mount(fake.transport());
