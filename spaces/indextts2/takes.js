// The takes of this visit, the newest first. They are in this page alone; the server keeps none.
const takes = [];
let count = 0, a = null, b = null;
const list = element.querySelector('ol'), button = element.querySelector('button'), hint = element.querySelector('small');
const make = (name, settings = {}, ...children) => {
  const node = Object.assign(document.createElement(name), settings);
  node.append(...children);
  return node;
};
const show = () => {
  for (const take of takes) {
    take.choices.forEach(([choice, node]) => node.setAttribute('aria-pressed', take === (choice === 'A' ? a : b)));
  }
  element.querySelector('section').hidden = !takes.length;
  button.hidden = hint.hidden = takes.length < 2;
  const playing = [a, b].findIndex(take => take && !take.player.paused);
  button.textContent = playing < 0 ? 'Play A and B in turn' : `Playing ${'AB'[playing]}: change to ${'BA'[playing]}`;
};
watch('value', () => {
  if (!props.value?.audio) return;
  const number = ++count;
  const player = make('audio', {controls: true, preload: 'auto', src: props.value.audio});
  player.setAttribute('aria-label', `Take ${number}`);
  const take = {player, number};
  take.choices = ['A', 'B'].map(choice => {
    const node = make('button', {type: 'button', textContent: choice, onclick: () => {
      if (choice === 'A') { if (b === take) b = a; a = take; } else { if (a === take) a = b; b = take; }
      show();
    }});
    node.setAttribute('aria-label', `Take ${number} is ${choice}`);
    return [choice, node];
  });
  ['play', 'pause', 'ended'].forEach(event => player.addEventListener(event, show));
  player.addEventListener('ended', () => { if (take.isInTurn && take === a && b) { b.isInTurn = true; b.player.currentTime = 0; b.player.play(); } take.isInTurn = false; });
  const words = make('p', {}, make('b', {textContent: `${number}`}), ` ${props.value.text}`);
  const figures = make('small', {textContent: props.value.figures});
  take.node = make('li', {}, words, figures, make('div', {className: 'player'}, player, ...take.choices.map(([, node]) => node)));
  [a, b] = [takes[0] ?? take, take];
  takes.unshift(take);
  list.prepend(take.node);
  for (const old of takes.splice(most)) {
    old.node.remove();
    if (a === old) a = takes.find(one => one !== b);
    if (b === old) b = takes.find(one => one !== a);
  }
  show();
});
// While one of the two plays, the other goes on at the same place of the line; they may have different lengths.
button.addEventListener('click', () => {
  if (!a || !b) return;
  const from = [a, b].find(take => !take.player.paused);
  const to = from ? (from === a ? b : a) : a;
  to.player.currentTime = from ? from.player.currentTime / from.player.duration * to.player.duration : 0;
  if (from) { from.isInTurn = false; from.player.pause(); }
  to.isInTurn = !from;
  to.player.play().catch(() => {});
});
show();
