// The segments play in order as they arrive. Those that are there stay untouched when another is added.
let next = 0;
const players = () => [...element.querySelectorAll('audio')];
const playNext = () => {
  const player = players()[next];
  if (player && players().every(one => one.paused || one.ended)) { next += 1; player.play().catch(() => {}); }
};
element.addEventListener('play', event => { next = players().indexOf(event.target) + 1; }, true);
element.addEventListener('ended', playNext, true);
watch('value', () => {
  if (players().length <= 1) next = 0;
  if (next === players().length - 1) playNext();
});
